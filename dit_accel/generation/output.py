"""Writing of videos, images, and two clips side by side."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.files import MARK

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

VIDEO_ENDINGS = (".mp4", ".gif")
IMAGE_ENDINGS = (".png",)
MARGIN = 12  # pixels between two clips side by side
SMALLEST_SIDE = 256  # of a frame shown side by side; smaller ones are enlarged by a whole factor


def check_matplotlib() -> None:
    """Refuse to draw a picture if matplotlib is not installed; the message has the command."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DitAccelError("A picture needs matplotlib, which is not installed: pip install 'dit_accel[plot]'.")


def sibling(output: Path, tag: str) -> str:
    """The name of a file that belongs to `output`: ``out.mp4`` and ``dense`` make ``out-dense.mp4``."""
    return f"{output.stem}-{tag}{output.suffix}"


def write_frames(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames, uint8 [F, H, W, 3], as mp4, gif or png (F = 1) by the path's ending, at `fps` frames a second.

    Raises:
        OSError: the file cannot be written, or lacks frames afterwards; ffmpeg is silent on a full disk.
    """
    from PIL import Image

    ending = path.suffix.lower()
    if ending == ".mp4":
        _write_mp4(path, frames, fps)
    elif ending == ".gif":  # with a palette for each frame
        first, *others = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=others, duration=_duration(fps), loop=0, comment=MARK)
    else:
        write_png(path, Image.fromarray(frames[0]))
    if (readable := _count_frames(path, fps)) != len(frames):
        raise OSError(f"{readable} of {len(frames)} frames can be read back, as on a full disk")


def write_png(path: Path, picture: Image) -> None:
    """Write a picture with the mark by which `dit_accel.files` knows it."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", MARK)
    picture.save(path, format="png", pnginfo=info)


def _count_frames(path: Path, fps: int) -> int:
    """Frames of a written file; 0 if it cannot be read."""
    from imageio_ffmpeg import count_frames_and_secs
    from PIL import Image, ImageSequence

    try:
        if path.suffix.lower() == ".mp4":
            return count_frames_and_secs(path)[0]  # a reader gives up after ten seconds, which a busy machine needs
        with Image.open(path) as picture:
            if path.suffix.lower() not in VIDEO_ENDINGS:
                picture.load()
                return 1
            shown = sum(frame.info["duration"] for frame in ImageSequence.Iterator(picture))  # equal ones are merged
            return round(shown / _duration(fps))
    except (OSError, RuntimeError, SyntaxError, ValueError):  # Pillow and ffmpeg raise them for damaged files
        return 0


def _duration(fps: int) -> int:
    """Milliseconds of a frame of a gif, which counts in hundredths of a second."""
    return max(20, round(100 / fps) * 10)


def _write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """H.264 in yuv420p, which every browser plays. It needs even sides, so an odd one repeats its last row."""
    import imageio.v2
    import numpy as np

    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with imageio.v2.get_writer(
        path,
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        quality=8,
        macro_block_size=1,
        ffmpeg_log_level="quiet",
        output_params=["-metadata", f"comment={MARK}"],
    ) as writer:
        for frame in even:
            writer.append_data(frame)


def side_by_side(left: np.ndarray, right: np.ndarray, captions: tuple[str, str], footer: str) -> np.ndarray:
    """Two clips of one shape side by side, with a caption over each and a footer: uint8 [F, H, W, 3]."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    factor = -(-SMALLEST_SIDE // min(left.shape[1:3]))
    left, right = (clip.repeat(factor, axis=1).repeat(factor, axis=2) for clip in (left, right))
    frames, height, width = left.shape[:3]
    size = max(13, width // 24)
    font = ImageFont.load_default(size=size)
    texts = [_wrapped(text, width, font) for text in captions] + [_wrapped(footer, 2 * width, font)]
    top, below = ((max(map(len, lines)) + 1) * size for lines in (texts[:2], texts[2:]))
    canvas = Image.new("RGB", (2 * width + MARGIN, top + height + below), "white")
    draw = ImageDraw.Draw(canvas)
    middle, centre = width // 2, canvas.width // 2
    places = ((middle, top // 2), (width + MARGIN + middle, top // 2), (centre, top + height + below // 2))
    for lines, place in zip(texts, places, strict=True):
        draw.multiline_text(place, "\n".join(lines), fill="black", font=font, anchor="mm", align="center", spacing=0)
    shown = np.repeat(np.asarray(canvas)[None], frames, axis=0)
    shown[:, top : top + height, :width] = left
    shown[:, top : top + height, width + MARGIN :] = right
    return shown


def _wrapped(text: str, room: int, font: Any) -> list[str]:
    """Lines of at most `room` pixels, broken at spaces and after commas, and within words that are longer."""
    lines = [""]
    for word in re.findall(r"[^\s,]*,?\s*", text):
        for part in [word] if font.getlength(word.rstrip()) <= room else word:
            if lines[-1] and font.getlength(lines[-1] + part.rstrip()) > room:
                lines.append("")
            lines[-1] += part
    return [line.rstrip() for line in lines]
