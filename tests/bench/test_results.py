"""Rows in files and pictures of them."""

import importlib.util

import pytest
from messages import names

from dit_accel.bench import results
from dit_accel.errors import DitAccelError
from dit_accel.files import append

RECORD = {"op": "gna", "shape": "a", "dtype": "float32", "direction": "forward", "impl": "portable", "gpu": None}
RECORD |= {"cpu": "a processor", "density": 0.1, "speedup": 7.0}


class TestFile:
    def test_rows_are_added(self, tmp_path):
        for speedup in (1, 2):
            append(tmp_path / "new" / "rows.jsonl", RECORD | {"speedup": speedup})
        assert [record["speedup"] for record in results.read(tmp_path / "new" / "rows.jsonl")] == [1, 2]

    def test_what_a_cut_run_left_of_a_line_does_not_count(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        append(path, RECORD)
        whole = path.read_bytes()
        path.write_bytes(whole + whole[: len(whole) // 2])
        assert results.read(path) == [RECORD]
        append(path, RECORD)
        assert path.read_bytes() == 2 * whole

    def test_a_cut_first_line(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"op": ')
        assert results.read(path) == []
        append(path, RECORD)
        assert results.read(path) == [RECORD]

    @pytest.mark.parametrize("line", ["{broken}", "[1]", '{"other": 1}'])
    def test_other_files_are_refused(self, tmp_path, line):
        path = tmp_path / "rows.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(DitAccelError, match=names("1")):
            results.read(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DitAccelError):
            results.read(tmp_path / "none.jsonl")


class TestPicture:
    def test_it_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        from PIL import Image

        results.draw([RECORD, RECORD | {"density": 0.5, "speedup": 1.5}], tmp_path / "rows.png")
        with Image.open(tmp_path / "rows.png") as picture:
            assert picture.format == "PNG"
            assert picture.width > 500

    def test_one_row_that_keeps_everything(self, tmp_path):
        pytest.importorskip("matplotlib")
        results.draw([RECORD | {"density": 1.0}], tmp_path / "rows.png")
        assert (tmp_path / "rows.png").exists()

    def test_without_matplotlib_the_error_says_what_to_install(self, monkeypatch, tmp_path):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DitAccelError, match=names("dit_accel[plot]")):
            results.draw([RECORD], tmp_path / "rows.png")

    def test_without_rows(self, tmp_path):
        pytest.importorskip("matplotlib")
        with pytest.raises(DitAccelError, match=names("rows")):
            results.draw([], tmp_path / "rows.png")
