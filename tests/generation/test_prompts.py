"""Where prompts and captioned media come from."""

import numpy as np
import pytest
from messages import names
from PIL import Image

from dit_accel.errors import DitAccelError
from dit_accel.generation import captioned, output, prompts


def picture(path, size=(8, 6), caption=None):
    Image.new("RGB", size, (10, 20, 30)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


class TestPrompts:
    def test_file(self, tmp_path):
        (tmp_path / "a.txt").write_text("  a red circle\n\nzwei Füchse\na red circle\n", encoding="utf-8")
        assert prompts.read(str(tmp_path / "a.txt")).texts == ("a red circle", "zwei Füchse", "a red circle")

    def test_what_windows_editors_write(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\na blue square\r\n")
        assert prompts.read(str(tmp_path / "a.txt")).texts == ("a red circle", "a blue square")

    @pytest.mark.parametrize("name", prompts.built_in())
    def test_built_in(self, name):
        texts = prompts.read(name).texts
        assert len(set(texts)) == len(texts) == (64 if name == "demo-64" else 16)

    def test_folder(self, tmp_path):
        picture(tmp_path / "b.png", caption="a red\n circle")
        picture(tmp_path / "a.jpg", caption="a blue square")
        listed = prompts.read(str(tmp_path))
        assert listed.texts == ("a blue square", "a red circle")
        assert [media.path.name for media in listed.media] == ["a.jpg", "b.png"]

    def test_refused(self, tmp_path):
        (tmp_path / "empty.txt").write_text("\n \n")
        (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "none").mkdir()
        (tmp_path / "bare").mkdir()
        picture(tmp_path / "bare" / "a.png")
        for source, message in (
            (tmp_path / "empty.txt", "holds no prompt"),
            (tmp_path / "binary.txt", "cannot be read as text"),
            (tmp_path / "none", "holds no image or video"),
            (tmp_path / "bare", r"such as a\.png. Write its caption to a\.txt"),
            ("dmeo", "Did you mean 'demo'"),
        ):
            with pytest.raises(DitAccelError, match=message):
                prompts.read(str(source))


class TestCaptioned:
    def test_frames_of_every_kind(self, tmp_path):
        frames = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
        for name in ("a.mp4", "b.gif"):
            output.write_frames(tmp_path / name, frames, fps=8)
            assert captioned.read_frames(tmp_path / name).shape == (4, 16, 24, 3)
        output.write_frames(tmp_path / "c.png", frames[:1], fps=1)
        assert np.array_equal(captioned.read_frames(tmp_path / "c.png"), frames[:1])

    @pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
    def test_damaged(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"no picture")
        with pytest.raises(DitAccelError, match=names(name)):
            captioned.read_frames(tmp_path / name)

    def test_captions(self, tmp_path):
        picture(tmp_path / "a.png", caption=" ")
        with pytest.raises(DitAccelError, match=names("a.txt")):
            captioned.find(tmp_path)
        picture(tmp_path / "a.png", caption="a")
        picture(tmp_path / "a.b.png")  # between the two in the order of names
        picture(tmp_path / "a.jpg")
        with pytest.raises(DitAccelError, match=names("caption")):
            captioned.find(tmp_path)
