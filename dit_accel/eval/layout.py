"""Samples under the names that other scorers read.

VBench 1.0 pairs a video with its prompt by the file's exact name, `{prompt}-{index}.mp4` in one folder. Where a file is
missing it warns and scores the others (Vchitect/VBench, `prompts/README.md` and `vbench/__init__.py`). It wants 5
videos a prompt, 25 for temporal flickering.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.eval.samples import key_of
from dit_accel.files import staged
from dit_accel.generation.output import write_frames

if TYPE_CHECKING:
    import numpy as np

FOLDER = "vbench"
LONGEST = 100  # letters of a label in a file's name
LONGEST_NAME = 255  # bytes of a file's name on usual file systems


def check(prompts: Sequence[str], frames: int) -> None:
    """Refuse prompts that are no file names, and images, which VBench does not take."""
    if frames == 1:
        raise DitAccelError("--layout vbench is for videos, and this evaluation makes images. Leave it out.")
    for prompt in prompts:
        if "/" in prompt or "\0" in prompt or len(f"{prompt}-00000.mp4".encode()) > LONGEST_NAME:
            raise DitAccelError(
                f"--layout vbench names files after prompts, and {prompt[:60]!r} has a slash or is longer than a "
                "file's name may be. Change the prompt, or leave the layout out."
            )


def write(
    folder: Path, labels: Sequence[str], items: Sequence[Any], frames: Callable[[str, Any], np.ndarray], fps: int
) -> None:
    """Write each sample as `folder/METHOD/{prompt}-{index}.mp4`; old files of these names are replaced.

    Args:
        items: prompt and seed; the index counts the seeds of a prompt from 0.
        frames: of a label's sample, uint8 [F, H, W, 3].
    """
    for label in labels:
        counts: collections.Counter[str] = collections.Counter()
        with staged(folder / slug(label) / "all") as stage:
            for item in items:
                write_frames(stage / f"{item.prompt}-{counts[item.prompt]}.mp4", frames(label, item), fps)
                counts[item.prompt] += 1


def slug(label: str) -> str:
    """A label as part of a file's name; a long one is cut, with a hash in place of the rest."""
    name = re.sub(r"[^A-Za-z0-9.=]+", "-", label)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{key_of({'label': label})[:8]}"
