"""Finding, opening and refusing published weights; a format from outside in one file."""

import json
import types

import pytest
import torch
from messages import names
from published_weights import moved, snapshot, unchanged
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoint import lora, published, weight_files
from dit_accel.errors import DitAccelError

OUTSIDE = '''
from dit_accel.checkpoint.model_weights import NewWeight
from dit_accel.checkpoint.published import Format, Tuned, WeightReading

class Outside(Format):
    """Weights of an outsider."""

    name, source, transformers = "outside", "-", ("WanTransformer3DModel",)

    def detect(self, files):
        return files.all_have("out_.*")

    def tuned(self, files):
        return Tuned("gna", {"window": 3})

    def read(self, model):
        weights = {key[4:]: NewWeight.of(stored) for key, stored in model.tensors.items()}
        return WeightReading(weights, {}, lambda name: False)

FORMAT = Outside()
'''


@pytest.fixture
def outside(monkeypatch, tmp_path_factory):
    """A format as an outsider writes it, in one file of the folder."""
    place = tmp_path_factory.mktemp("outside")
    (place / "outside.py").write_text(OUTSIDE)
    import dit_accel.checkpoint.formats as folder

    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(place)])
    published.get_formats.cache_clear()
    forget = published.get_formats.cache_clear
    yield
    forget()


def test_a_format_from_outside_is_one_file(outside, tiny_wan, wan_inputs, tmp_path):
    """It replaces two weights. What is saved after it is ours, and holds these two alone."""
    model, before = tiny_wan(), snapshot(tiny_wan())
    new = {key: moved(model)[key] for key in ("blocks.0.attn1.to_q.weight", "proj_out.bias")}
    save_file({f"out_{key}": value for key, value in new.items()}, tmp_path / "weights.safetensors")
    with dit_accel.load(model, tmp_path / "weights.safetensors") as accel, torch.no_grad():
        assert (accel.setting.method, accel.setting.config.window) == ("gna", 3)
        assert all(torch.equal(model.get_parameter(key), value) for key, value in new.items())
        out = model(**wan_inputs(), return_dict=False)[0]
        accel.save_pretrained(tmp_path / "ours")
    assert unchanged(model, before)
    stored = weight_files.open_weights(tmp_path / "ours" / "transformer").models["transformer"]
    assert stored.tensors.keys() == new.keys()
    with dit_accel.load(model, tmp_path / "ours") as accel, torch.no_grad():
        assert torch.equal(model(**wan_inputs(), return_dict=False)[0], out)
        accel.save_pretrained(tmp_path / "again")
    assert unchanged(model, before)
    dit_accel.load(model, tmp_path / "again").remove()
    model.load_state_dict(moved(model))
    with pytest.raises(DitAccelError, match="other weights of the same shape"):
        dit_accel.load(model, tmp_path / "ours")


def test_weights_that_replace_others_are_recorded_against_the_base_model(outside, tiny_wan, tmp_path):
    model = tiny_wan()
    for name, value in (("a", 0.0), ("b", 1.0)):
        save_file({"out_proj_out.bias": torch.full((16,), value)}, tmp_path / f"{name}.safetensors")
        accel = dit_accel.load(model, tmp_path / f"{name}.safetensors", replace=True)
    accel.save_pretrained(tmp_path / "ours")
    accel.remove()
    assert unchanged(model, snapshot(tiny_wan()))
    dit_accel.load(model, tmp_path / "ours").remove()


def refused(model, path, message, **how):
    before = snapshot(model)
    with pytest.raises(DitAccelError, match=names(message)) as caught:
        dit_accel.load(model, path, **how)
    assert "\n" not in str(caught.value) and unchanged(model, before)


@pytest.fixture
def sharded(outside, tiny_wan, tmp_path):
    """A pipeline's folder whose transformer is in two files, with an index."""
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    parts = [{}, {}]
    for i, (key, value) in enumerate(moved(tiny_wan()).items()):
        parts[i % 2][f"out_{key}"] = value
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    listed = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {}, "weight_map": listed}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_weights_in_several_files(index, sharded, tiny_wan):
    """With an index, and as FastWan 14B without one."""
    if not index:
        next(sharded.glob("*.json")).unlink()
    model = tiny_wan()
    with dit_accel.load(model, sharded.parent):
        assert all(torch.equal(value, moved(tiny_wan())[key]) for key, value in model.state_dict().items())


def test_a_lost_part_is_named(sharded, tiny_wan):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    content = lost.read_bytes()
    lost.unlink()
    refused(tiny_wan(), sharded.parent, "diffusion_pytorch_model-00002-of-00002.safetensors missing")
    index = next(sharded.glob("*.json"))
    listed = index.read_text()
    index.unlink()
    refused(tiny_wan(), sharded.parent, "1 of 2 parts")
    lost.write_bytes(content[:-4])
    refused(tiny_wan(), sharded.parent, f"{lost.name} damaged")
    lost.write_bytes(content)
    index.write_text(listed.replace("out_proj_out.bias", "out_proj_out.bais"))
    refused(tiny_wan(), sharded.parent, "index.json out_proj_out.bais")


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "pytorch_model.bin", "model.ckpt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(name, outside, tiny_wan, tmp_path):
    torch.save({f"out_{key}": value for key, value in moved(tiny_wan()).items()}, tmp_path / name)
    with pytest.raises(DitAccelError, match="pickle") as caught:
        dit_accel.load(tiny_wan(), tmp_path / name)
    refused(tiny_wan(), tmp_path, "pickle")
    program = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(program, {})
    dit_accel.load(tiny_wan(), tmp_path).remove()


def test_other_files_are_refused(outside, tiny_wan, tiny_flux, tmp_path):
    refused(tiny_wan(), tmp_path, ".safetensors")
    refused(tiny_wan(), tmp_path / "nowhere" / "at" / "all", "nowhere/at/all")
    refused(tiny_wan(), 5, "5")
    (tmp_path / "a.txt").write_text("")
    refused(tiny_wan(), tmp_path / "a.txt", "a.txt .safetensors")
    for name in "ab":
        save_file({"something.weight": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    refused(tiny_wan(), tmp_path, "a.safetensors, b.safetensors")
    refused(tiny_wan(), tmp_path / "a.safetensors", "something.weight")
    refused(tiny_wan(), tmp_path / "a.safetensors", "revision", revision="main")
    save_file({"out_proj_out.bias": torch.zeros(16)}, tmp_path / "c.safetensors")
    refused(tiny_flux(), tmp_path / "c.safetensors", "outside WanTransformer3DModel FluxTransformer2DModel")
    refused(tiny_wan(), tmp_path / "c.safetensors", "gna 'widow'", widow=3)
    pair = types.SimpleNamespace(components={"transformer": tiny_wan(), "transformer_2": tiny_wan()})
    with pytest.raises(DitAccelError, match=names("transformer", "transformer_2")):
        dit_accel.load(pair, tmp_path / "c.safetensors")
    with dit_accel.accelerated(tiny_wan(), "gna", window=3) as accel:
        accel.save_pretrained(tmp_path / "ours")
    refused(tiny_wan(), tmp_path / "ours", "saved accelerator window", window=5)


def test_a_model_whose_weights_cannot_be_replaced_is_refused(outside, tiny_wan, tmp_path):
    save_file({"out_proj_out.bias": torch.zeros(16)}, tmp_path / "c.safetensors")
    for model in (tiny_wan().to(torch.float8_e4m3fn), tiny_wan().to("meta")):
        with pytest.raises(DitAccelError, match="cannot be replaced"):
            dit_accel.load(model, tmp_path / "c.safetensors")


def test_two_formats_that_both_fit_are_an_error(outside, monkeypatch, tiny_wan, tmp_path):
    known = dict(published.get_formats())
    known["twin"] = type("Twin", (type(known["outside"]),), {"name": "twin"})()
    monkeypatch.setattr(published, "get_formats", lambda: known)
    save_file({"out_proj_out.bias": torch.zeros(16)}, tmp_path / "c.safetensors")
    refused(tiny_wan(), tmp_path / "c.safetensors", "formats (outside, twin)")


def test_an_error_while_weights_are_replaced_restores_them(outside, monkeypatch, tiny_wan, tmp_path):
    save_file({f"out_{key}": value for key, value in moved(tiny_wan()).items()}, tmp_path / "c.safetensors")
    count = iter(range(100))
    read = weight_files.StoredTensor.read

    def full(stored):
        if next(count) == 20:
            raise DitAccelError("the disk is gone")
        return read(stored)

    monkeypatch.setattr(weight_files.StoredTensor, "read", full)
    model = tiny_wan()
    refused(model, tmp_path / "c.safetensors", "the disk is gone")
    assert not hasattr(model.blocks[0].attn1.processor, "inner")


def test_weights_return_to_where_the_model_is_by_then(outside, tiny_wan, tmp_path):
    """And adapters loaded since stay."""
    save_file({f"out_{key}": value for key, value in moved(tiny_wan()).items()}, tmp_path / "c.safetensors")
    model, before = tiny_wan(), snapshot(tiny_wan())
    with dit_accel.load(model, tmp_path / "c.safetensors"):
        lora.add_lora(model, ["blocks.0.attn1.to_q"], rank=2, alpha=2)
    weights = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
    assert all(torch.equal(value, before[key]) for key, value in weights.items()) and len(weights) == len(before)


class Hub:
    """Stands in for the Hugging Face Hub: a repository is a folder."""

    def __init__(self, monkeypatch, folder, offline=False):
        self.folder, self.offline, self.requests = folder, offline, []
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def list_repo_files(self, repository, revision=None):
        from huggingface_hub.errors import OfflineModeIsEnabled

        if self.offline:
            raise OfflineModeIsEnabled("offline")
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def download(self, repository, revision=None, allow_patterns=None, local_files_only=False):
        self.requests.append((repository, revision, sorted(allow_patterns or []), local_files_only))
        return str(self.folder)


def test_a_repository_is_fetched_without_its_codec(monkeypatch, sharded, tiny_wan):
    folder = sharded.parent
    (folder / "vae").mkdir()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (folder / "model_index.json").write_text("{}")
    hub = Hub(monkeypatch, folder)
    dit_accel.load(tiny_wan(), "owner/name", revision="v1").remove()
    dit_accel.load(tiny_wan(), "owner/name@v2").remove()
    (_, first, wanted, _), (name, second, *_) = hub.requests
    assert (name, first, second) == ("owner/name", "v1", "v2")
    assert len(wanted) == 4 and not any(name.startswith("vae/") for name in wanted)
    Hub(monkeypatch, folder, offline=True)
    dit_accel.load(tiny_wan(), "owner/name").remove()


def test_one_file_of_a_repository(outside, monkeypatch, tiny_wan, tmp_path):
    for name in ("a", "b"):
        save_file({"out_proj_out.bias": torch.zeros(16)}, tmp_path / f"{name}.safetensors")
    hub = Hub(monkeypatch, tmp_path)
    dit_accel.load(tiny_wan(), "owner/name/b.safetensors").remove()
    assert hub.requests == [("owner/name", None, ["b.safetensors"], False)]


def test_a_repository_of_pickles_is_refused_before_it_is_fetched(outside, monkeypatch, tiny_wan, tmp_path):
    (tmp_path / "TurboWan.pth").write_bytes(b"")
    hub = Hub(monkeypatch, tmp_path)
    refused(tiny_wan(), "owner/name", "hf download owner/name TurboWan.pth safetensors.torch")
    assert not hub.requests


def test_an_unreachable_hub_is_one_line(tiny_wan):
    refused(tiny_wan(), "owner/name", "owner/name repository")
