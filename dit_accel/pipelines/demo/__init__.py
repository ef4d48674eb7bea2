"""The embedded demo: a small `WanPipeline` that draws a coloured shape moving over a plain background.

    from dit_accel.pipelines.demo import DEFAULTS, load_demo
    video = load_demo()("a red circle moves right on a blue background", **DEFAULTS.call()).frames[0]

Importing this package imports neither torch nor Diffusers; `README.md` beside this file is the model card.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.pipelines.quiet import quiet_libraries, quietly

if TYPE_CHECKING:
    import torch
    from diffusers import WanPipeline

WEIGHTS = Path(__file__).parent / "weights"  # a pipeline folder in Diffusers' format


@dataclass(frozen=True)
class Settings:
    """A size and the way to denoise it that the demo was trained and measured with."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int = 12
    guidance_scale: float = 1.0
    fps: int = 8

    def call(self) -> dict[str, Any]:
        """The keyword arguments for the pipeline's call: everything but `fps`."""
        arguments = asdict(self)
        del arguments["fps"]
        return arguments

    @property
    def tokens(self) -> int:
        """Video tokens in the transformer: 2 frames x 8 x 8 pixels each."""
        return (1 + (self.num_frames - 1) // 2) * (self.height // 8) * (self.width // 8)


DEFAULTS = Settings(height=192, width=192, num_frames=17)  # 9 x 24 x 24 = 5,184 tokens
LARGE = Settings(height=224, width=256, num_frames=17)  # 9 x 28 x 32 = 8,064 tokens
SIZES = {"default": DEFAULTS, "large": LARGE}


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that the demo does not know, in order; it reads each as the same unknown word."""
    known = json.loads((WEIGHTS / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    return [word for word in re.findall(r"\w+", prompt.lower()) if word not in known]


def load_demo(
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu", folder: Path = WEIGHTS, **parts: Any
) -> WanPipeline:
    """Load the demo pipeline from the package's own files; nothing is downloaded and no pickle is read.

    Args:
        dtype: of all weights; float32 by default.
        device: where they go.
        folder: another pipeline folder that `train.py --export` wrote.
        parts: further arguments of Diffusers' `from_pretrained`, such as components in place of the folder's.

    Raises:
        FileNotFoundError: `folder` holds no pipeline.
    """
    import torch

    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no pipeline in {folder} (model_index.json is missing); reinstall dit_accel")
    with quiet_libraries():
        from diffusers import WanPipeline

        from dit_accel.pipelines.demo import codec  # noqa: F401  the index names it, and Diffusers wants it imported

        with quietly():
            pipe = WanPipeline.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True, **parts)
        return pipe.to(device)
