"""CLEAR's weights under their published names: what FLUX computes with them, with pooled keys and without."""

import json
import re

import pytest
import torch
from accuracy import assert_accurate
from messages import names, says
from published_weights import Example, by_formula, in_dtype, moved, random, snapshot, unchanged
from safetensors.torch import save_file

import dit_accel
from dit_accel.errors import DitAccelError

TEXT, LAYERS = 13, 4
WEIGHTS = re.compile(r"(single_)?transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)\.(weight|bias)")
FLUX = "diffusers.models.transformers.transformer_flux"


def cells():
    return [0.25 * random(4, 4, seed=30 + i) + 1 / 16 for i in range(LAYERS)]


def published(model, pooled=False):
    weights = {key: value for key, value in moved(model).items() if WEIGHTS.fullmatch(key)}
    names = [*(f"transformer_blocks.{i}" for i in (0, 1)), *(f"single_transformer_blocks.{i}" for i in (0, 1))]
    for name, weight in zip(names, cells(), strict=True) if pooled else ():
        weights[f"{name}.attn.processor.spatial_weight"] = weight.reshape(1, 1, 1, 4, 1, 4, 1)
    return weights


EXAMPLE = Example("flux", lambda model: published(model, pooled=True), settings={"radius": 8})


def formula(model, inputs, size, radius, dtype, pooled):
    """Softmax over the text, the disc and the pooled keys; text queries see text and image alone."""
    y, x = torch.arange(size[0])[:, None].expand(size).flatten(), torch.arange(size[1]).repeat(size[0])
    near = (y[:, None] - y).square() + (x[:, None] - x).square() < radius**2
    mask = torch.ones(TEXT + len(y), TEXT + len(y), dtype=torch.bool)
    mask[TEXT:, TEXT:] = near

    def attend(layer, q, k, v, hidden):
        seen = mask
        if pooled:
            weight = cells()[layer].to(dtype)

            def pool(tokens):
                parts = tokens[:, :, TEXT:].unflatten(2, (size[0] // 4, 4, size[1] // 4, 4))
                return (parts * weight[:, None, :, None]).sum((3, 5)).flatten(2, 3)

            extra = torch.zeros(len(mask), len(y) // 16, dtype=torch.bool)
            extra[TEXT:] = True
            seen = torch.cat([mask, extra], 1)
            k, v = torch.cat([k, pool(k)], 2), torch.cat([v, pool(v)], 2)
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        return logits.softmax(-1) @ v

    attentions = [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
    return by_formula(model.to(dtype), in_dtype(inputs, dtype), attend, attentions, where=FLUX)


@pytest.mark.parametrize(
    ("size", "pooled"), [((13, 11), False), ((17, 3), False), ((12, 8), True), ((4, 20), True)], ids=str
)
@pytest.mark.parametrize("radius", [3, 8])
def test_it_computes_the_authors_function(radius, size, pooled, tiny_flux, flux_inputs, tmp_path):
    model, reference, inputs = tiny_flux(), tiny_flux(), flux_inputs(size)
    before = snapshot(model)
    save_file(published(model, pooled), tmp_path / "weights.safetensors")
    reference.load_state_dict(published(model), strict=False)
    plain, exact = (formula(reference, inputs, size, radius, dtype, pooled) for dtype in (torch.float32, torch.float64))
    with dit_accel.load(model, tmp_path / "weights.safetensors", radius=radius) as accel, torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
        assert_accurate("clear", out, plain, exact)
        assert accel.trained.changed.keys() == {"transformer"} and not accel.trained.full
        accel.save_pretrained(tmp_path / "ours")
    assert unchanged(model, before)
    with dit_accel.load(model, tmp_path / "ours") as again, torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], out)
        assert again.setting.config.radius == radius and again.setting.config.pool == 4 * pooled


def test_pooled_keys_need_whole_cells(tiny_flux, flux_inputs, tmp_path):
    model = tiny_flux()
    save_file(published(model, pooled=True), tmp_path / "weights.safetensors")
    with dit_accel.load(model, tmp_path / "weights.safetensors", radius=8):
        with pytest.raises(DitAccelError, match=names(4, "1x13x11")):
            model(**flux_inputs((13, 11)))


def test_the_radius_is_asked_for(tiny_flux, tmp_path):
    save_file(published(tiny_flux()), tmp_path / "clear_local_16.safetensors")
    with pytest.raises(DitAccelError, match=names("8, 16", 32, "--set radius=")):
        dit_accel.load(tiny_flux(), tmp_path / "clear_local_16.safetensors")


def test_an_evaluation_takes_the_radius(cli, flux_folder, tmp_path):
    """On the command line and in a suite; the report's command names it too."""
    from diffusers import FluxTransformer2DModel

    file = tmp_path / "clear_local_8.safetensors"
    save_file(published(FluxTransformer2DModel.from_pretrained(flux_folder / "transformer")), file)
    (tmp_path / "prompts.txt").write_text("a circle\n")
    (tmp_path / "suite.yaml").write_text(f"methods:\n- {{load: {file}, settings: [radius=3]}}\n")
    size = ("--height", 128, "--width", 128, "--steps", 1, "--metric", "psnr", "--prompts", tmp_path / "prompts.txt")
    for number, words in enumerate((("--load", file, "--set", "radius=3"), ("--suite", tmp_path / "suite.yaml"))):
        output = tmp_path / f"eval{number}"
        done = cli("eval", "--model", flux_folder, *words, *size, "--output", output)
        assert done.status == 0, done.err
        _, row = json.loads((output / "summary.json").read_text())["rows"]
        assert says(row["label"], "clear:radius=3", file.name) and says(
            row["command"], "--load", file, "--set", "radius=3"
        )
    for words, named in (
        (("--method", "clear:radius=3", "--set", "radius=5"), ("--set", "--load")),
        (("--load", file), ("radius=", "--set")),
        (("--load", file, "--set", "radius=3", "--set", "widow=3"), ("widow",)),
    ):
        refused = cli("eval", "--model", flux_folder, *words, *size, "--output", tmp_path / "none")
        assert refused.status == 2 and says(refused.err, *named) and refused.err.count("\n") == 1
    assert not (tmp_path / "none").exists()
