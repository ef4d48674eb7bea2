"""What a candidate of a folder runs: the setting that it shows."""

import shutil
from pathlib import Path

import pytest

import dit_accel
from dit_accel.generation.candidate import Candidate, told_apart

SLA = {"topk": 0.3, "block": 16}


@pytest.fixture
def folder(tiny_wan, tmp_path):
    """A saved accelerator with a schedule, a step cache and learned weights for one of its layers."""
    with dit_accel.accelerated(tiny_wan(), "sla", dense_steps=2, cache="first-block:threshold=0.5", **SLA) as accel:
        accel.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("cache", [None, "none", "first-block:threshold=0.1"])
def test_a_folder_runs_the_setting_that_is_shown(cache, folder, tiny_wan):
    candidate = Candidate.read(folder, cache=cache)
    with candidate.apply(tiny_wan()) as accel:
        assert accel.setting == candidate.setting
        assert (accel.setting.cache is None) == (cache == "none") == ("cache" not in candidate.label)


def test_one_step_of_a_folder_runs_the_method(folder, tiny_wan):
    with Candidate.read(folder).without_dense_steps().apply(tiny_wan()) as accel:
        assert accel.setting.cache is None and accel.setting.schedule.dense_steps == 0
        assert len(accel.learned_weights()) == 1


def test_labels_have_as_much_of_the_path_as_it_takes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a/x/saved", "b/x/saved"):
        shutil.copytree(folder, tmp_path / path)
    text = Candidate.read(folder).setting.text
    candidates = [Candidate.read(Path(path)) for path in ("saved", "a/x/saved", "b/x/saved", "saved")]
    labels = [candidate.label for candidate in told_apart([*candidates, Candidate()])]
    assert labels == [*(f"{text} from {path}" for path in ("saved", "a/x/saved", "b/x/saved", "saved")), "baseline"]
