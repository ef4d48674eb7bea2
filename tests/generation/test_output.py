"""Files: checked before the work, complete or absent after it."""

import imageio.v2
import numpy as np
import pytest
from PIL import Image

from dit_accel.errors import DitAccelError
from dit_accel.generation import output


def clip(frames=3, height=16, width=24):
    ramp = np.linspace(0, 255, frames * height * width * 3).astype("uint8")
    return ramp.reshape(frames, height, width, 3)


def test_staged_files_appear_together(tmp_path):
    with output.staged(tmp_path / "new" / "a.txt") as stage:
        (stage / "a.txt").write_text("a")
        (stage / "b.txt").write_text("b")
        assert list((tmp_path / "new").glob("*.txt")) == []
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.txt"]


def test_nothing_is_left_when_writing_fails(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), output.staged(tmp_path / "a.txt") as stage:
        (stage / "a.txt").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_what_a_killed_process_left_is_removed(tmp_path):
    others = (".dit-accel-a.b.txt.x1", ".dit-accel-a.gif.x1", ".dit-accel-b.txt.x1")
    for name in (".dit-accel-a.txt.x1", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("half")
    with output.staged(tmp_path / "a.txt") as stage:
        (stage / "a.txt").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*others, "a.txt"]


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(DitAccelError, match="could not be written: No space left"),
        output.staged(tmp_path / "a") as stage,
    ):
        (stage / "a").write_text("x")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path):
    with pytest.raises(DitAccelError, match="cannot be written"):
        output.check_output(tmp_path / f"{'a' * 250}.mp4", (".mp4",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mov", "a", "a.mp4.txt"])
def test_endings(tmp_path, name):
    with pytest.raises(DitAccelError, match=r"should end in \.mp4 or \.gif"):
        output.check_output(tmp_path / name, output.VIDEO_ENDINGS)


def test_a_folder_is_no_output(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(DitAccelError, match="is a folder"):
        output.check_output(tmp_path / "a.mp4", output.VIDEO_ENDINGS)


def test_an_unwritable_folder_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DitAccelError, match="cannot be written"):
        output.check_output(tmp_path / "file" / "a.mp4", output.VIDEO_ENDINGS)


def test_a_folder_that_is_not_there_yet_is_fine_and_not_made(tmp_path):
    output.check_output(tmp_path / "x" / "y" / "a.mp4", output.VIDEO_ENDINGS)
    assert list(tmp_path.iterdir()) == []


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
    shown = output.side_by_side(left, right, ("left", "a caption far longer than the clip is wide " * 3), "both")
    factor = 256 // 16
    width = 24 * factor
    rows = (shown.shape[1] - 16 * factor) // 2
    inside = shown[:, rows : rows + 16 * factor : factor]
    assert np.array_equal(inside[:, :, :width:factor], left)
    assert np.array_equal(inside[:, :, width + output.MARGIN :: factor], right)
    assert (shown[:, :rows] < 128).any(), "no caption is drawn"
