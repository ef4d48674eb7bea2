"""Diffusers' layer skipping and guiders: they intercept attention by a function mode or look up processor classes."""

import contextlib

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import AutoGuidance, LayerSkipConfig, PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry, SmoothedEnergyGuidanceConfig, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from tiny_models import run
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel.registry import get_families

# The models whose attention Diffusers can skip, and in which stack: the others raise in the untouched model too.
STACKS = {
    "cogview:cogview4": "transformer_blocks",
    "hunyuan_image:refiner": "transformer_blocks",
    "pixart:t2i": "transformer_blocks",
    "qwen_image:t2i": "transformer_blocks",
    "z_image:t2i": "layers",
}
BLOCKS = {"wan:t2v": "blocks", "ltx:t2v": "transformer_blocks"}  # of whole blocks only
MODES = {
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    "attention": {"skip_attention": True, "skip_ff": False},
    "block": {"skip_attention": True, "skip_ff": True},
}
WORKING = {
    "scores": list(STACKS),
    "attention": ["cogview:cogview4", "pixart:t2i", "z_image:t2i"],
    "block": ["hunyuan_image:refiner", "pixart:t2i", *BLOCKS],
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def skip(transformer, stack, mode):
    apply_layer_skip(transformer, LayerSkipConfig(indices=[0], fqn=stack, **MODES[mode]))


def unhook(transformer):
    HookRegistry.check_if_exists_or_initialize(transformer).remove_hook("layer_skip_hook", recurse=True)


def each_mode():
    return pytest.mark.parametrize(
        ("name", "mode"), [(name, mode) for mode, names in WORKING.items() for name in names]
    )


@pytest.mark.parametrize("order", ["before", "after"])
@each_mode()
def test_layer_skip_equals_dense_in_both_orders(name, mode, order):
    """With every pair kept, a skipped layer does what it does in the dense model."""
    tiny, stack = tiny_models.get(*name.split(":")), (STACKS | BLOCKS)[name]
    transformer, call = tiny.build(), tiny.call()
    skip(transformer, stack, mode)
    wanted = run(transformer, call)
    assert (wanted - tiny.dense).abs().max() > 0.05
    if order == "after":
        unhook(transformer)
    with dit_accel.accelerated(transformer, "gna", window="full") as accel:
        if order == "after":
            skip(transformer, stack, mode)
        torch.testing.assert_close(run(transformer, call), wanted, **CLOSE)
        layers = accel.report().layers
    skipped = [layer for layer in layers if layer.name.startswith(f"{stack}.0.")]
    assert skipped and sum(layer.sparse_calls for layer in layers) == len(layers) - len(skipped)
    if mode == "scores":
        assert {str(layer.dense_reasons) for layer in skipped} == {"{'attention replaced by a function mode': 1}"}
    unhook(transformer)
    torch.testing.assert_close(run(transformer, call), tiny.dense)


@pytest.mark.parametrize("tiny", tiny_models.all_models(), ids=str)
def test_these_are_all_models_whose_attention_diffusers_can_skip(tiny):
    able, transformer = str(tiny) in (*STACKS, "hunyuan_image:glyphs", "qwen_image:edit"), tiny.build()
    for path in {name.split(".")[0] for name, _ in get_families()[tiny.family].attentions(transformer)}:
        with contextlib.nullcontext() if able else pytest.raises((ValueError, AttributeError)):
            skip(transformer, path, "scores")


@pytest.mark.parametrize("name", STACKS)
def test_skipped_scores_are_the_same_under_every_mask(name):
    """With the scores of all layers skipped, no method computes anything."""
    tiny, stack = tiny_models.get(*name.split(":")), STACKS[name]
    transformer = tiny.build()
    indices = list(range(len(getattr(transformer, stack))))
    apply_layer_skip(transformer, LayerSkipConfig(indices=indices, fqn=stack, **MODES["scores"]))
    wanted = run(transformer, tiny.call())
    names = [name for name, _ in get_families()[tiny.family].attentions(transformer)]
    rest = tuple(index for index, name in enumerate(names) if not name.startswith(stack))
    with dit_accel.accelerated(transformer, "gna", window=1, dense_layers=rest):
        torch.testing.assert_close(run(transformer, tiny.call()), wanted)


def predictions(guider, transformer, call):
    """The predictions of one step, prepared and cleaned up as a modular pipeline does."""
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    outputs = []
    for _ in range(guider.num_conditions):
        guider.prepare_models(transformer)
        outputs.append(run(transformer, call))
        guider.cleanup_models(transformer)
    return outputs


def config(name, mode):
    return LayerSkipConfig(indices=[0], fqn=STACKS[name], **MODES[mode])


def _whole(name):
    """How that model's layers are skipped, beyond their scores where Diffusers can."""
    return next((mode for mode in ("block", "attention") if name in WORKING[mode]), "scores")


GUIDERS = {
    "perturbed": lambda name: PerturbedAttentionGuidance(
        perturbed_guidance_config=config(name, "scores"),
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    ),
    "skip layer": lambda name: SkipLayerGuidance(
        skip_layer_config=config(name, _whole(name)),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    ),
    "auto": lambda name: AutoGuidance(auto_guidance_config=config(name, _whole(name))),
}


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("name", STACKS)
def test_guiders_predict_as_with_dense_attention(name, kind):
    tiny = tiny_models.get(*name.split(":"))
    transformer, guider = tiny.build(), GUIDERS[kind](name)
    wanted = predictions(guider, transformer, tiny.call())
    assert max((one - wanted[0]).abs().max() for one in wanted[1:]) > 0.05
    with dit_accel.accelerated(transformer, "gna", window="full"):
        for sparse, dense in zip(predictions(guider, transformer, tiny.call()), wanted, strict=True):
            torch.testing.assert_close(sparse, dense, **CLOSE)


@pytest.mark.parametrize("name", STACKS)
def test_smoothed_queries_reach_the_plan(name):
    """Smoothed energy guidance hooks the query projection. Its guider of Diffusers 0.42 never applies the hook."""
    tiny = tiny_models.get(*name.split(":"))
    transformer, smoothed = tiny.build(), SmoothedEnergyGuidanceConfig(indices=[0], fqn=STACKS[name])
    _apply_smoothed_energy_guidance_hook(transformer, smoothed, blur_sigma=1.0)
    wanted = run(transformer, tiny.call())
    assert (wanted - tiny.dense).abs().max() > 0.01
    with dit_accel.accelerated(transformer, "gna", window="full"):
        torch.testing.assert_close(run(transformer, tiny.call()), wanted, **CLOSE)


def test_layer_skip_in_a_compiled_model():
    tiny = tiny_models.get("pixart", "t2i")
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, "gna", window=(1, 3, 3)):
        skip(transformer, "transformer_blocks", "scores")
        eager = run(transformer, tiny.call())
        compiled = torch.compile(transformer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(compiled, tiny.call()), eager)


class Scaling(TorchFunctionMode):
    """Sees attention calls, passes them on with queries scaled, and doubles what comes back."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = factor, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return 2 * func(args[0] * self.factor, *args[1:], **(kwargs or {}))


def test_a_function_mode_may_pass_the_call_on():
    """What it changes reaches the plan, and it changes what the plan returns."""
    tiny = tiny_models.get("pixart", "t2i")
    with Scaling(0.5) as mode:
        wanted = run(tiny.shared, tiny.call())
    dense_calls = mode.calls
    with dit_accel.accelerated(tiny.shared, "gna", window="full") as accel, Scaling(0.5) as mode:
        sparse = run(tiny.shared, tiny.call())
    assert mode.calls == dense_calls
    assert accel.report().dense_calls == 0
    torch.testing.assert_close(sparse, wanted, **CLOSE)
