"""Samples on disk: whole or not there."""

import json

import numpy as np
import pytest

from dit_accel.errors import DitAccelError
from dit_accel.eval.samples import RESULTS, Results, Store, key_of

ROW = {"key": "a", "label": "gna", "prompt": "p", "seed": 0, "sha256": "0", "seconds": 1.0, "denoising_seconds": 0.5}
ROW |= {"density": 0.5, "steps": 2, "attention_seconds": None, "peak_memory": None, "cached": False}


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)


def test_key_depends_on_every_part_and_not_on_order():
    assert key_of({"a": 1, "b": [2, 3]}) == key_of({"b": [2, 3], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert len(key_of({})) == 32


class TestStore:
    def test_gives_back_what_it_got(self, tmp_path, frames):
        store = Store(tmp_path / "new")
        row = store.write(frames, ROW)
        assert store.find("a") == row
        assert row["sha256"] != ROW["sha256"]
        assert np.array_equal(store.frames("a"), frames)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]

    def test_frames_with_any_strides(self, tmp_path, frames):
        turned = frames.transpose(3, 1, 2, 0)[..., :1].transpose(3, 1, 2, 0)  # a view with strides of its own
        store = Store(tmp_path)
        assert store.find(store.write(turned, ROW)["key"]) is not None
        assert np.array_equal(store.frames("a"), turned)

    def test_finds_nothing_where_nothing_is(self, tmp_path):
        assert Store(tmp_path).find("a") is None

    @pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"", lambda data: data[:-1] + b"\x00"])
    def test_damaged_file_is_not_there(self, tmp_path, frames, damage):
        frames[-1, -1, -1, -1] = 7
        store = Store(tmp_path)
        store.write(frames, ROW)
        path = store.path("a")
        path.write_bytes(damage(path.read_bytes()))
        assert store.find("a") is None

    def test_folder_that_cannot_be_made(self, tmp_path, frames):
        (tmp_path / "file").write_text("")
        with pytest.raises(DitAccelError, match="could not be written"):
            Store(tmp_path / "file").write(frames, ROW)


class TestResults:
    def rows(self, folder):
        results = Results(folder)
        results.read()
        return results

    def test_rows_of_all_processes(self, tmp_path):
        for process in range(3):
            Results(tmp_path, process).add(ROW | {"key": str(process)})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["results-1.jsonl", "results-2.jsonl", RESULTS]
        assert set(self.rows(tmp_path).rows) == {"0", "1", "2"}

    def test_damaged_lines_are_named(self, tmp_path):
        lines = [json.dumps(ROW), '{"key": "b", "lab', "\x00\x00", "[]", json.dumps(ROW | {"key": "c"}), '{"key"']
        (tmp_path / RESULTS).write_text("\n".join(lines))
        results = self.rows(tmp_path)
        assert results.damaged == [f"{RESULTS}, line {number}" for number in (2, 3, 4, 6)]
        assert set(results.rows) == {"a", "c"}
        results.add(ROW | {"key": "d"})
        assert set(self.rows(tmp_path).rows) == {"a", "c", "d"}

    @pytest.mark.parametrize("seconds", ["0.5", 0, -1, None, True, [1]])
    def test_a_time_that_is_none_is_damage(self, tmp_path, seconds):
        rows = [ROW, ROW | {"key": "b", "denoising_seconds": seconds}]
        (tmp_path / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = self.rows(tmp_path)
        assert (set(results.rows), results.damaged) == ({"a"}, [f"{RESULTS}, line 2"])

    def test_rewritten_in_order_with_others_behind(self, tmp_path):
        Results(tmp_path, 1).add(ROW | {"key": "other"})
        results = self.rows(tmp_path)
        results.rewrite([ROW | {"key": "b"}, ROW | {"key": "a"}])
        assert [path.name for path in tmp_path.iterdir()] == [RESULTS]
        assert list(self.rows(tmp_path).rows) == ["b", "a", "other"]
