"""Prompts: a file, a list that comes with the package, or a folder of captioned images or videos."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dit_accel.errors import DitAccelError, first_line
from dit_accel.generation import captioned
from dit_accel.generation.captioned import Captioned
from dit_accel.registry import did_you_mean

LISTS = Path(__file__).parent / "prompt_lists"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a source, in order.

    Args:
        media: the captioned images or videos with these captions; empty for other sources.
    """

    texts: tuple[str, ...]
    media: tuple[Captioned, ...] = ()


def built_in() -> list[str]:
    """Names of the lists that come with the package."""
    return sorted(path.stem for path in LISTS.glob("*.json"))


def read(source: str) -> Prompts:
    """The prompts of a text file (one a line), a built-in list, or a folder of captioned images or videos.

    Raises:
        DitAccelError: there is no such source, it cannot be read or holds no prompt, or an image has no caption.
    """
    path = Path(source).expanduser()
    media: tuple[Captioned, ...] = ()
    if source in built_in():
        texts = json.loads((LISTS / f"{source}.json").read_text(encoding="utf-8"))
    elif path.is_dir():
        media = tuple(captioned.find_all(path, "give the folder as --real, which needs no captions"))
        texts = [item.caption for item in media]
    elif path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DitAccelError(f"--prompts {path} cannot be read as text: {first_line(error)}.") from error
        texts = [line.strip() for line in lines if line.strip()]
    else:
        raise DitAccelError(
            f"--prompts {source} is not a file, a folder or a built-in list."
            f"{did_you_mean(source, built_in())} Built-in lists: {', '.join(built_in())}."
        )
    if not texts:
        raise DitAccelError(f"--prompts {source} holds no prompt. Write one per line.")
    return Prompts(tuple(texts), media)
