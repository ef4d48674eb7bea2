"""Videos, images and two clips side by side."""

import resource

import imageio.v2
import numpy as np
import pytest
from PIL import Image

from dit_accel.generation import output


def clip(frames=3, height=16, width=24):
    ramp = np.linspace(0, 255, frames * height * width * 3).astype("uint8")
    return ramp.reshape(frames, height, width, 3)


@pytest.mark.parametrize("sides", [(16, 24), (15, 23)])
def test_mp4_keeps_frames_size_and_rate(tmp_path, sides):
    output.write_frames(tmp_path / "a.mp4", clip(5, *sides), fps=8)
    with imageio.v2.get_reader(tmp_path / "a.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 8
        frames = [reader.get_data(i) for i in range(reader.count_frames())]
    assert len(frames) == 5
    assert frames[0].shape[:2] == (16, 24)
    assert np.abs(frames[2][:15, :23].astype(int) - clip(5, *sides)[2][:15, :23]).mean() < 8


def test_gif_keeps_frames_and_rate(tmp_path):
    output.write_frames(tmp_path / "a.gif", clip(4), fps=8)
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.n_frames, picture.size, picture.info["duration"]) == (4, (24, 16), 120)


def test_png_is_exact(tmp_path):
    output.write_frames(tmp_path / "a.png", clip(1), fps=1)
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), clip(1)[0])


def test_side_by_side_holds_both_clips():
    left, right = clip(), 255 - clip()
    caption = "a caption far longer than the clip is wide " + 30 * "and-without-a-space"
    shown = output.side_by_side(left, right, ("left", caption), "both")
    factor = 256 // 16
    width = 24 * factor
    rows = shown.shape[1] - 16 * factor - 2 * (width // 24)  # below: a line and space of half a line on both sides
    inside = shown[:, rows : rows + 16 * factor : factor]
    assert np.array_equal(inside[:, :, :width:factor], left)
    assert np.array_equal(inside[:, :, width + output.MARGIN :: factor], right)
    assert (shown[:, :rows, :width] < 128).any(), "no caption is drawn"
    lines = (shown[0, :rows, width + output.MARGIN :] < 128).any((1, 2))
    assert np.count_nonzero(lines[1:] & ~lines[:-1]) > 4, "the caption has no lines"
    assert (shown[:, :rows, width : width + output.MARGIN] == 255).all(), "a caption is wider than its clip"


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_a_file_that_the_disk_cut_off_is_an_error(tmp_path, ending):
    """ffmpeg says nothing of a full disk, here a limit on the size of files."""
    noise = np.random.default_rng(0).integers(0, 256, (1 if ending == "png" else 9, 64, 64, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match=r"frames can be read back|File too large"):
            output.write_frames(tmp_path / f"a.{ending}", noise, fps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_equal_frames_of_a_gif_count(tmp_path):
    output.write_frames(tmp_path / "a.gif", np.repeat(clip(1), 5, axis=0), fps=8)
