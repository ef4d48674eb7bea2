"""Diffusers' layer skipping and guiders: they intercept attention by a function mode or look up processor classes."""

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

# The families that Diffusers can skip layers of, and how: the others raise in the untouched model too.
STACKS = {"hunyuan_image": "transformer_blocks", "pixart": "transformer_blocks", "qwen_image": "transformer_blocks"}
STACKS |= {"z_image": "layers"}
MODES = {
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    "attention": {"skip_attention": True, "skip_ff": False},
    "block": {"skip_attention": True, "skip_ff": True},
}
WORKING = {
    "scores": list(STACKS),
    "attention": ["pixart", "z_image"],
    "block": ["hunyuan_image", "pixart"],
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def first(family):
    return next(tiny for tiny in tiny_models.all_models() if tiny.family == family)


def skip(transformer, family, mode):
    apply_layer_skip(transformer, LayerSkipConfig(indices=[0], fqn=STACKS[family], **MODES[mode]))


def unhook(transformer):
    HookRegistry.check_if_exists_or_initialize(transformer).remove_hook("layer_skip_hook", recurse=True)


def each_mode():
    runs = [(family, mode) for mode, families in WORKING.items() for family in families]
    return pytest.mark.parametrize(("family", "mode"), runs)


@pytest.mark.parametrize("order", ["before", "after"])
@each_mode()
def test_layer_skip_equals_dense_in_both_orders(family, mode, order):
    """With every pair kept, a skipped layer does what it does in the dense model."""
    tiny = first(family)
    transformer, call = tiny.build(), tiny.call()
    skip(transformer, family, mode)
    wanted = run(transformer, call)
    assert (wanted - tiny.dense).abs().max() > 0.05
    if order == "after":
        unhook(transformer)
    with dit_accel.accelerated(transformer, "gna", window="full") as accel:
        if order == "after":
            skip(transformer, family, mode)
        torch.testing.assert_close(run(transformer, call), wanted, **CLOSE)
        layers = accel.report().layers
    if mode == "scores":
        reasons = [layer.dense_reasons for layer in layers if layer.name.startswith(f"{STACKS[family]}.0.")]
        assert reasons == [{"attention replaced by a function mode": 1}] * len(reasons) and reasons
    assert sum(layer.sparse_calls for layer in layers) == len(layers) - sum(
        layer.name.startswith(f"{STACKS[family]}.0.") for layer in layers
    )
    unhook(transformer)
    torch.testing.assert_close(run(transformer, call), tiny.dense)


@pytest.mark.parametrize("family", STACKS)
def test_skipped_scores_are_the_same_under_every_mask(family):
    """With the scores of all layers skipped, no method computes anything."""
    tiny = first(family)
    transformer = tiny.build()
    stack = STACKS[family]
    indices = list(range(len(getattr(transformer, stack))))
    apply_layer_skip(transformer, LayerSkipConfig(indices=indices, fqn=stack, **MODES["scores"]))
    wanted = run(transformer, tiny.call())
    with dit_accel.accelerated(transformer, "gna", window=1, dense_layers=dense_rest(family, transformer)):
        torch.testing.assert_close(run(transformer, tiny.call()), wanted)


def dense_rest(family, transformer):
    """Indices of the layers outside the skipped stack."""
    names = [name for name, _ in get_families()[family].attentions(transformer)]
    return tuple(index for index, name in enumerate(names) if not name.startswith(STACKS[family]))


def predictions(guider, transformer, call):
    """The predictions of one step, prepared and cleaned up as a modular pipeline does."""
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    found = []
    for _ in range(guider.num_conditions):
        guider.prepare_models(transformer)
        found.append(run(transformer, call))
        guider.cleanup_models(transformer)
    return found


def config(family, **changes):
    return LayerSkipConfig(indices=[0], fqn=STACKS[family], **changes)


def _whole(family):
    """How that family's layers are skipped, beyond their scores where Diffusers can."""
    return next((mode for mode in ("block", "attention") if family in WORKING[mode]), "scores")


GUIDERS = {
    "perturbed": lambda family: PerturbedAttentionGuidance(
        perturbed_guidance_config=config(family, **MODES["scores"]),
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    ),
    "skip layer": lambda family: SkipLayerGuidance(
        skip_layer_config=config(family, **MODES[_whole(family)]),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    ),
    "auto": lambda family: AutoGuidance(auto_guidance_config=config(family, **MODES[_whole(family)])),
}


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("family", STACKS)
def test_guiders_predict_as_with_dense_attention(family, kind):
    tiny = first(family)
    transformer, guider = tiny.build(), GUIDERS[kind](family)
    wanted = predictions(guider, transformer, tiny.call())
    assert max((one - wanted[0]).abs().max() for one in wanted[1:]) > 0.05
    with dit_accel.accelerated(transformer, "gna", window="full"):
        for ours, dense in zip(predictions(guider, transformer, tiny.call()), wanted, strict=True):
            torch.testing.assert_close(ours, dense, **CLOSE)


@pytest.mark.parametrize("family", STACKS)
def test_smoothed_queries_reach_the_plan(family):
    """Smoothed energy guidance hooks the query projection. Its guider of Diffusers 0.42 never applies the hook."""
    tiny = first(family)
    transformer, smoothed = tiny.build(), SmoothedEnergyGuidanceConfig(indices=[0], fqn=STACKS[family])
    _apply_smoothed_energy_guidance_hook(transformer, smoothed, blur_sigma=1.0)
    wanted = run(transformer, tiny.call())
    assert (wanted - tiny.dense).abs().max() > 0.01
    with dit_accel.accelerated(transformer, "gna", window="full"):
        torch.testing.assert_close(run(transformer, tiny.call()), wanted, **CLOSE)


def test_layer_skip_in_a_compiled_model():
    tiny = first("pixart")
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, "gna", window=(1, 3, 3)):
        skip(transformer, "pixart", "scores")
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
    tiny = first("pixart")
    with Scaling(0.5) as mode:
        wanted = run(tiny.shared, tiny.call())
    dense_calls = mode.calls
    with dit_accel.accelerated(tiny.shared, "gna", window="full") as accel, Scaling(0.5) as mode:
        ours = run(tiny.shared, tiny.call())
    assert mode.calls == dense_calls
    assert accel.report().dense_calls == 0
    torch.testing.assert_close(ours, wanted, **CLOSE)
