"""Folders of captioned images and videos: ``NAME.mp4`` (or gif, png, jpg, jpeg, webp) with ``NAME.txt`` beside it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.errors import DitAccelError, first_line

if TYPE_CHECKING:
    import numpy as np

VIDEOS = (".mp4", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class Captioned:
    """An image or video, and the caption beside it; None without one."""

    path: Path
    caption: str | None


def find(folder: Path) -> list[Captioned]:
    """The images and videos of a folder in the order of their names.

    Raises:
        DitAccelError: there are none, two of them share a caption's file, or a caption cannot be read or is empty.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS + PICTURES)
    if not paths:
        raise DitAccelError(f"{folder} holds no image or video ({', '.join(VIDEOS + PICTURES)}).")
    for other, path in itertools.pairwise(sorted(paths, key=lambda path: path.stem)):
        if other.stem == path.stem:
            raise DitAccelError(f"{other.name} and {path.name} in {folder} share one caption. Rename one of them.")
    return [Captioned(path, _caption(path.with_suffix(".txt"))) for path in paths]


def find_all(folder: Path, otherwise: str) -> list[Captioned]:
    """As `find`; a file without a caption is refused. `otherwise` is what the user can do besides writing it."""
    items = find(folder)
    bare = [item.path for item in items if item.caption is None]
    if bare:
        raise DitAccelError(
            f"{len(bare)} of {len(items)} files in {folder} have no caption, such as {bare[0].name}. Write its "
            f"caption to {bare[0].with_suffix('.txt').name} beside it, or {otherwise}."
        )
    return items


def _caption(path: Path) -> str | None:
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DitAccelError(f"The caption {path} cannot be read: {first_line(error)}.") from error
    if not text:
        raise DitAccelError(f"The caption {path} is empty. Write a caption into it, or remove the file.")
    return text


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video, or an image as one frame: uint8 [F, H, W, 3].

    Raises:
        DitAccelError: the file cannot be read or holds no frame.
    """
    import imageio.v2
    import numpy as np
    from PIL import Image, ImageSequence

    try:
        if path.suffix.lower() == ".mp4":
            with imageio.v2.get_reader(path, format="FFMPEG") as reader:
                frames = [np.asarray(frame) for frame in reader]
        else:
            with Image.open(path) as picture:
                frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:  # Pillow and ffmpeg raise them for damaged files
        raise DitAccelError(f"{path} cannot be read as an image or video ({first_line(error)}).") from error
    if not frames:
        raise DitAccelError(f"{path} holds no frame. Remove it or make it again.")
    return np.stack(frames)
