"""What docs/published-weights.md tells people to type runs on small models of the names that it uses.

MiniMax-H3's section is tested in `tests/generation/test_minimax_h3.py`, where that pipeline is.
"""

import importlib.util
import json
import pathlib
import shutil

import pages
import pytest
from messages import says
from published_weights import section
from safetensors.torch import save_file

WAN, FLUX = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "black-forest-labs/FLUX.1-dev"
SIZES = {WAN: {"frames": 5, "height": 96, "width": 96}, FLUX: {"height": 128, "width": 128}}
WEIGHTS = {
    "turbowan": "IPostYellow/TurboWan2.1-T2V-1.3B-Diffusers",
    "fastwan": "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
    "clear": "clear_local_16.safetensors",
}


@pytest.fixture
def place(monkeypatch, wan_folder, flux_folder, tmp_path):
    """A folder with the models and weights of the page, in small, to work in."""
    from diffusers import FluxTransformer2DModel, WanTransformer3DModel

    models = {}
    for name, folder, kind in ((WAN, wan_folder, WanTransformer3DModel), (FLUX, flux_folder, FluxTransformer2DModel)):
        shutil.copytree(folder, tmp_path / name)
        models[name] = kind.from_pretrained(folder / "transformer")
    for name, path in WEIGHTS.items():
        spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"test_{name}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if path.endswith(".safetensors"):
            save_file(module.published(models[FLUX]), tmp_path / path)
            continue
        (tmp_path / path / "transformer").mkdir(parents=True)
        (tmp_path / path / "model_index.json").write_text(json.dumps({"_class_name": "WanDMDPipeline"}))
        save_file(module.published(models[WAN]), tmp_path / path / "transformer" / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("title", [None, "TurboDiffusion's Wan", "FastWan", "CLEAR"])
def test_the_page(title, root, cli, place):
    program, commands = section(root, title)
    if program:
        names = {}
        exec(f"import dit_accel\nfrom diffusers import *\n{program}", names)
        names["accel"].remove()
    for line in commands:
        arguments = pages.words(line)
        model, output = pages.value(arguments, "--model"), pages.value(arguments, "--output")
        done = cli(*(pages.small(arguments, **SIZES[model], steps=1) if output else arguments))
        assert done.status == 0, done.err
        assert output is None or (place / output).is_file()
        assert arguments[0] != "doctor" or says(done.out, "fits", model)
