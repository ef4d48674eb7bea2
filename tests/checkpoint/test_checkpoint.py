"""Saving an accelerator and loading it into the model it belongs to, and into nothing else."""

import json
import os
import shutil

import pytest
import safetensors
import torch
from messages import names
from torch import nn

import dit_accel
from dit_accel.caches.ratios import MagRatios, mag_ratios
from dit_accel.checkpoint import format as checkpoint
from dit_accel.checkpoint import lora as adapters

SLA = {"topk": 0.3, "block": 16}
TRAINED = {"model": "demo", "revision": None, "fingerprints": {}, "lora": False, "full": False, "call": {}}
TRAINED |= {"lora_sha256": None}


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def train(accel):
    for module in accel.learned_weights().values():
        nn.init.normal_(module.proj.weight)


@pytest.fixture
def saved(tiny_wan, wan_inputs, tmp_path):
    """A folder with trained SLA weights, and what the model gave with them."""
    transformer = tiny_wan()
    folder = tmp_path / "sla"
    with dit_accel.accelerated(transformer, "sla", dense_steps=1, dense_layers=(1,), impl="reference", **SLA) as accel:
        train(accel)
        accel.save_pretrained(folder)
        accel.set_step(1, 2)
        return folder, run(transformer, wan_inputs())


def test_round_trip_with_learned_weights(saved, tiny_wan, wan_inputs):
    folder, wanted = saved
    assert sorted(os.listdir(folder)) == [checkpoint.SETTINGS_FILE, checkpoint.WEIGHTS_FILE]
    transformer = tiny_wan()
    accel = dit_accel.load(transformer, folder)
    accel.set_step(1, 2)
    assert torch.equal(run(transformer, wan_inputs()), wanted)
    assert (
        accel.setting.config.topk == 0.3 and accel.setting.schedule.dense_layers == (1,) and accel.impl == "reference"
    )
    for name, module in accel.learned_weights().items():
        assert name.endswith("attn1.sparse_linear") and module.proj.weight.dtype == torch.float32
    accel.remove()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setting": [1]}, "setting"),
        ({"setting": {"method": "sla", "config": [1]}}, "sla"),
        ({"setting": {"method": "sla", "config": {"topk": 0.3, "verify": "first-call"}}}, "verify"),
        ({"setting": {"method": "sla", "config": {"topk": "many"}}}, "topk"),
        ({"setting": {"method": "sla", "config": {}, "schedule": {"dense_stps": 2}}}, "dense_stps"),
        ({"setting": {"method": ["sla"]}}, "method"),
        ({"models": {"transformer": {"class": "WanTransformer3DModel"}}}, "models"),
        ({"trained": {"model": "demo"}}, "trained"),
        ({"trained": TRAINED | {"fingerprints": []}}, "fingerprints"),
        ({"trained": TRAINED | {"lora": "no"}}, "lora"),
        ({"trained": TRAINED}, "demo"),
        ({"impl": None}, "impl"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else None,
)
def test_what_was_changed_by_hand_is_refused(saved, tiny_wan, change, message):
    folder, _ = saved
    content = json.loads((folder / checkpoint.SETTINGS_FILE).read_text())
    (folder / checkpoint.SETTINGS_FILE).write_text(json.dumps(content | change))
    transformer = tiny_wan()
    with pytest.raises(dit_accel.DitAccelError, match=names(message)):
        dit_accel.load(transformer, folder)
    assert all(type(module.processor).__name__ == "WanAttnProcessor" for module in attentions(transformer))


def attentions(transformer):
    return [block.attn1 for block in transformer.blocks]


@pytest.mark.parametrize(
    ("method", "config"), [("gna", {"window": (3, "full", 0.5), "causal": (True, False, False)}), ("dense", {})]
)
def test_round_trip_of_settings_alone(method, config, tiny_wan, tmp_path):
    transformer = tiny_wan()
    with dit_accel.accelerated(transformer, method, dense_last_steps=0.1, **config) as accel:
        accel.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [checkpoint.SETTINGS_FILE]
    with dit_accel.load(transformer, tmp_path) as loaded:
        assert loaded.setting.config == accel.setting.config and loaded.setting.schedule == accel.setting.schedule


def test_the_version_and_the_model_are_stamped(saved):
    content = json.loads((saved[0] / checkpoint.SETTINGS_FILE).read_text())
    assert content["dit_accel_version"] == dit_accel.__version__
    assert content["models"]["transformer"]["class"] == "WanTransformer3DModel"


def test_saving_again_replaces_and_drops_old_weights(saved, tiny_wan):
    folder, _ = saved
    with dit_accel.accelerated(tiny_wan(), "gna", window=3) as accel:
        accel.save_pretrained(folder)
    assert os.listdir(folder) == [checkpoint.SETTINGS_FILE]


CALIBRATION = MagRatios((1.0, 0.98, 0.95), (1.0, 0.97, 0.94), source="demo, 3 steps")


def ratios_of(accel):
    return mag_ratios(accel.setting.cache.config["mag_ratios"])


@pytest.fixture
def calibrated(tiny_wan, tmp_path, monkeypatch):
    """A folder of an accelerator whose cache took its ratios from a relative path that is gone."""
    monkeypatch.chdir(tmp_path)
    CALIBRATION.save(tmp_path / "r.json")
    with dit_accel.accelerated(tiny_wan(), "dense", cache="mag:threshold=0.1,mag_ratios=r.json") as accel:
        accel.save_pretrained("saved")
    (tmp_path / "r.json").unlink()
    return tmp_path / "saved"


def test_ratios_are_saved_and_found_from_another_directory(calibrated, tiny_wan, tmp_path, monkeypatch):
    assert sorted(os.listdir(calibrated)) == [checkpoint.SETTINGS_FILE, checkpoint.RATIOS_FILE]
    record = json.loads((calibrated / checkpoint.SETTINGS_FILE).read_text())
    assert record["setting"]["cache"]["config"] == {"threshold": 0.1, "mag_ratios": checkpoint.RATIOS_FILE}
    transformer = tiny_wan()
    with dit_accel.load(transformer, "saved") as accel:  # a relative folder, too
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert ratios_of(accel) == CALIBRATION
        accel.save_pretrained(tmp_path / "again")
    with dit_accel.load(transformer, tmp_path / "again") as accel:
        accel.save_pretrained(tmp_path / "again")  # over the file that it was loaded from
        assert ratios_of(accel) == CALIBRATION and accel.setting.cache.config["threshold"] == 0.1


def test_a_moved_folder_has_its_ratios(calibrated, tiny_wan, tmp_path):
    shutil.move(calibrated, tmp_path / "moved")
    with dit_accel.load(tiny_wan(), tmp_path / "moved") as accel:
        assert ratios_of(accel) == CALIBRATION


@pytest.mark.parametrize("cache", [None, "mag:mag_ratios=0.98", "mag:mag_ratios=wan2.1-t2v-1.3b", "first-block"])
def test_saving_again_without_a_calibration_drops_the_old_ratios(cache, calibrated, tiny_wan):
    transformer = tiny_wan()
    with dit_accel.accelerated(transformer, "gna", window=3, cache=cache) as accel:
        accel.save_pretrained(calibrated)
    assert os.listdir(calibrated) == [checkpoint.SETTINGS_FILE]
    with dit_accel.load(transformer, calibrated) as loaded:
        assert loaded.setting == accel.setting


@pytest.mark.parametrize("content", [None, "", '{"source": "another save", "cond": [1.0]}'])
def test_ratios_of_another_save_are_refused(content, calibrated, tiny_wan):
    file = calibrated / checkpoint.RATIOS_FILE
    file.unlink() if content is None else file.write_text(content)
    refused(tiny_wan(), calibrated, checkpoint.RATIOS_FILE)


def test_a_calibration_that_is_gone_is_not_saved(tiny_wan, tmp_path):
    CALIBRATION.save(tmp_path / "r.json")
    with dit_accel.accelerated(tiny_wan(), "dense", cache=f"mag:mag_ratios={tmp_path / 'r.json'}") as accel:
        (tmp_path / "r.json").unlink()
        with pytest.raises(dit_accel.DitAccelError, match="mag_ratios"):
            accel.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_save_of_before_ratios_had_a_file_takes_them_from_their_path(calibrated, tiny_wan, tmp_path):
    """A record as this format had it before."""
    file = calibrated / checkpoint.SETTINGS_FILE
    record = json.loads(file.read_text())
    del record["ratios_sha256"]
    record["setting"]["cache"]["config"]["mag_ratios"] = str(tmp_path / "r.json")
    file.write_text(json.dumps(record))
    CALIBRATION.save(tmp_path / "r.json")
    with dit_accel.load(tiny_wan(), calibrated) as accel:
        assert ratios_of(accel) == CALIBRATION


def test_an_origin_in_the_configuration_does_not_matter(saved, tiny_wan):
    transformer = tiny_wan()
    transformer.register_to_config(_name_or_path="somewhere/else")
    dit_accel.load(transformer, saved[0]).remove()


def refused(target, folder, message):
    processors = dict(target.attn_processors)
    with pytest.raises(dit_accel.DitAccelError, match=names(message)) as caught:
        dit_accel.load(target, folder)
    assert "\n" not in str(caught.value)
    assert target.attn_processors == processors


def test_another_model_is_refused(saved, tiny_wan, tiny_flux):
    folder, _ = saved
    refused(
        tiny_flux(), folder, "saved for transformer: WanTransformer3DModel, but this model's is FluxTransformer2DModel"
    )
    refused(tiny_wan(3), folder, "another configuration")


def test_other_components_are_refused(saved, tiny_wan):
    pipe = type("Pipe", (), {"components": {"transformer": tiny_wan(), "transformer_2": tiny_wan()}})()
    with pytest.raises(dit_accel.DitAccelError, match=names("transformer", "transformer_2")):
        dit_accel.load(pipe, saved[0])


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_refused(size, saved, tiny_wan):
    file = saved[0] / checkpoint.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:size])
    refused(tiny_wan(), saved[0], "truncated or damaged")


def test_changed_weights_are_refused(saved, tiny_wan):
    file = saved[0] / checkpoint.WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(tiny_wan(), saved[0], "does not belong to")


def test_missing_weights_are_refused(saved, tiny_wan):
    (saved[0] / checkpoint.WEIGHTS_FILE).unlink()
    refused(tiny_wan(), saved[0], "cannot be read")


@pytest.mark.parametrize("dense_layers", [0, 1, 2])
def test_weights_for_other_layers_are_refused(dense_layers, saved, tiny_wan):
    file = saved[0] / checkpoint.SETTINGS_FILE
    content = json.loads(file.read_text())
    content["setting"]["schedule"]["dense_layers"] = dense_layers
    file.write_text(json.dumps(content))
    refused(tiny_wan(), saved[0], "do not fit the accelerated layers")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "saved accelerator"),
        ('{"format": 2}', "saved accelerator"),
        (None, "saved accelerator"),
    ],
)
def test_other_files_are_refused(content, message, tiny_wan, tmp_path):
    if content is not None:
        (tmp_path / checkpoint.SETTINGS_FILE).write_text(content)
    refused(tiny_wan(), tmp_path, message)


def test_a_newer_format_is_refused(saved, tiny_wan):
    file = saved[0] / checkpoint.SETTINGS_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99, "dit_accel_version": "9.9"}))
    refused(tiny_wan(), saved[0], "format 99, written by dit_accel 9.9")


def test_loading_over_an_accelerator_needs_replace(saved, tiny_wan):
    transformer = tiny_wan()
    first = dit_accel.accelerate(transformer, "gna", window=3)
    with pytest.raises(dit_accel.DitAccelError, match="already accelerated"):
        dit_accel.load(transformer, saved[0])
    assert first.active
    dit_accel.load(transformer, saved[0], replace=True).remove()
    assert not first.active


def test_a_damaged_folder_does_not_cost_the_accelerator_at_work(saved, tiny_wan):
    transformer = tiny_wan()
    first = dit_accel.accelerate(transformer, "gna", window=3)
    (saved[0] / checkpoint.WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(dit_accel.DitAccelError, match="truncated"):
        dit_accel.load(transformer, saved[0], replace=True)
    assert first.active


def test_a_folder_that_cannot_be_written_is_refused(tiny_wan, tmp_path):
    (tmp_path / "file").write_text("")
    with dit_accel.accelerated(tiny_wan(), "dense") as accel:
        with pytest.raises(dit_accel.DitAccelError, match="Cannot save the accelerator"):
            accel.save_pretrained(tmp_path / "file")


def test_nothing_half_written(saved, tiny_wan, monkeypatch):
    """A full disk in the middle leaves the old files and no temporary ones."""
    folder, _ = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with dit_accel.accelerated(tiny_wan(), "sla", **SLA) as accel:
        train(accel)
        with pytest.raises(dit_accel.DitAccelError, match="No space left"):
            accel.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_an_adapters_file_has_the_same_bytes_every_time(tiny_wan, tmp_path):
    """The library that writes it shuffles the entries of its metadata."""
    transformer = tiny_wan()
    adapters.add_lora(transformer, ["blocks.0.attn1.to_q"], rank=2, alpha=2)
    (content,) = {adapters._lora_file({"transformer": transformer}) for _ in range(20)}
    path = tmp_path / adapters.LORA_FILE
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.metadata()) == ["format", adapters.LORA_METADATA, "note"]
        weights = {key: file.get_tensor(key) for key in file.keys()}
    adapter = {f"transformer.{name}": weight for name, weight in transformer.named_parameters() if "lora_" in name}
    assert len(weights) == 2
    for name, weight in adapter.items():
        assert torch.equal(weights[name.replace(f".{adapters.ADAPTER}", "")], weight)
