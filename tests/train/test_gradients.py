"""Gradients through every method inside real transformers, against finite differences; teacher and recomputation."""

import copy
import math

import pytest
import torch
from messages import names
from method_settings import in_models

import dit_accel
from dit_accel.checkpoint import lora as adapters
from dit_accel.hooks.selfcheck import ComputedAttention
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.pipelines.targets import find_transformers
from dit_accel.plans.gate import BlockGate, GateSample
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid
from dit_accel.train.networks import TrainingNetworks
from dit_accel.train.objectives import OBJECTIVES, Outputs, losses, of_methods

METHODS = in_models()
LINEAR = {"topk": 0.0, "feature_map": "hedgehog"}


@pytest.fixture
def model(tiny_wan, wan_inputs, tiny_flux, flux_inputs):
    """Makes a transformer in fp64 and a call of it: Wan, and FLUX with text in the sequence."""

    def make(family):
        transformer, inputs = (
            (tiny_wan(), wan_inputs(3, 6, 8, batch=1))
            if family == "wan"
            else (tiny_flux(), flux_inputs((5, 6), (5, 6), (5, 6), text=5, batch=1))
        )
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        return transformer.double(), inputs

    return make


def test_every_method_is_here():
    assert {*METHODS, "dense"} == set(dit_accel.list_methods())


@pytest.mark.parametrize(
    ("method", "family"), [(name, "wan") for name in METHODS] + [(name, "flux") for name in ("gna", "sla", "proxy")]
)
def test_gradients_equal_finite_differences(method, family, model, monkeypatch):
    """Along one random direction in the weights of all LoRAs and of the method, by central differences in fp64.

    Diffusers' models compute norms and modulation in float32 whatever their dtype, so `float()` is made to mean fp64.

    With step h the difference errs by h² times the third derivative (about 1e-8 of the gradient here) and by rounding,
    eps / h (about 1e-11): 1e-6 leaves room for both and none for a missing term.
    """
    to_float = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))
    transformer, inputs = model(family)
    settings = METHODS[method] | (LINEAR if (method, family) == ("sla", "flux") else {})
    accel = dit_accel.accelerate(transformer, method, impl="portable", **settings)
    attentions = find_transformers(transformer)[0]["transformer"][1].attentions(transformer)
    targets = [f"{name}.{part}" for name, _ in attentions for part in ("to_q", "to_k", "to_v")]
    torch.manual_seed(1)
    adapters.add_lora(transformer, targets, rank=2, alpha=2)
    for module in accel.learned_weights().values():
        module.double().requires_grad_(method != "moh")  # its gradient goes straight through: no difference shows it
    weights = [weight for weight in transformer.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = 0.3 * torch.randn(weight.shape, dtype=torch.float64)
    target = torch.randn(transformer(**inputs, return_dict=False)[0].shape, dtype=torch.float64)

    def loss():
        return (transformer(**inputs, return_dict=False)[0] - target).square().mean()

    gradients = torch.autograd.grad(loss(), weights)
    assert all(gradient.abs().max() > 0 for gradient in gradients), "every trained weight has a gradient"
    directions = [torch.randn_like(weight) for weight in weights]
    wanted = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, directions, strict=True))
    step, ends = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for weight, way in zip(weights, directions, strict=True):
                weight += sign * step * way
            ends.append(float(loss()))
    difference = (ends[0] - ends[1]) / (2 * step)
    assert abs(difference - wanted) <= 1e-6 * max(abs(wanted), 1e-3)
    assert accel.report().dense_calls == 0


@pytest.mark.parametrize("lora", [True, False])
def test_the_teacher_is_the_untouched_model(lora, tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    untouched = copy.deepcopy(transformer)
    accel = dit_accel.accelerate(transformer, "sla", topk=0.3, block=16)
    family = find_transformers(transformer)[0]["transformer"][1]
    if lora:
        adapters.add_lora(transformer, ["blocks.0.attn1.to_q"], rank=2, alpha=2)
    teacher = None if lora else untouched
    networks = TrainingNetworks(
        transformer, family, accel, lora=lora, layers=(1,), objectives=("final",), teacher=teacher
    )
    with torch.no_grad():
        for weight in transformer.parameters():
            if weight.requires_grad:
                weight += 0.1
    call = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    with torch.no_grad():
        wanted = untouched(**inputs, return_dict=False)[0]
        taught = networks.teacher(inputs["hidden_states"], inputs["timestep"], call)
        student = networks.outputs(transformer, inputs["hidden_states"], inputs["timestep"], call)
    assert torch.equal(taught.prediction, wanted) and not torch.equal(student.prediction, wanted)
    assert len(taught.attention) == len(student.attention) == 1 and taught.hidden is not None
    assert accel.report().layers[0].sparse_calls == 1


def test_recomputing_activations_changes_no_gradient(tiny_wan, wan_inputs):
    """With a teacher's call in front, which must not be what the recomputation runs."""
    gradients = []
    for checkpointing in (False, True):
        transformer, inputs = tiny_wan().train(), wan_inputs(batch=1)
        accel = dit_accel.accelerate(transformer, "gna", window=(3, 5, 4))
        family = find_transformers(transformer)[0]["transformer"][1]
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        networks = TrainingNetworks(transformer, family, accel, lora=False, layers=(0, 1))
        call = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
        wanted = networks.teacher(inputs["hidden_states"], inputs["timestep"], call)
        student = networks.outputs(transformer, inputs["hidden_states"], inputs["timestep"], call)
        loss = sum(OBJECTIVES[name](student, wanted, wanted.prediction) for name in ("teacher", "attention"))
        gradients.append(torch.autograd.grad(loss, list(transformer.blocks[0].attn1.to_q.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0 and torch.equal(plain, recomputed)


def test_a_model_without_the_head_that_is_watched_is_refused():
    import tiny_models

    transformer = tiny_models.get("kandinsky5", "t2v").shared
    family = find_transformers(transformer)[0]["transformer"][1]
    with dit_accel.accelerated(transformer, "dense") as accel:
        with pytest.raises(dit_accel.DitAccelError, match=names("Kandinsky5Transformer3DModel")):
            TrainingNetworks(transformer, family, accel, lora=False, objectives=("final",))


def test_objectives_by_hand():
    ones = torch.ones(1, 1, 1, 1)
    pooled = torch.tensor([[[[0.0, 5, 5], [math.log(3), 5, 5]]]])
    gates = [GateSample(BlockGate(1, 1), ones, pooled, torch.full((1, 1, 1, 2), 0.5), 1.0, 0)]
    q = torch.tensor([[[[math.log(3), 0], [math.log(3), 0]]]])
    k = torch.tensor([[[[0, 0], [math.log(3), 0]]]])
    module, linear = SparseLinearAttention(2, **LINEAR), plan("sla", TokenGrid(1, 1, 2), **LINEAR)
    calls = [ComputedAttention("", "", None, linear, q, k, k, k, scale=0.0, module=module)]
    records = {"gate": gates, "imitation": calls}
    attention = [torch.tensor([2.0]), torch.tensor([0.0])]
    student = Outputs(torch.tensor([1.0, 3.0]), attention, torch.tensor([1.0]), records)
    teacher = Outputs(torch.tensor([1.0, 1.0]), [torch.tensor([1.0]), torch.tensor([4.0])], torch.tensor([2.0]))
    names = {*OBJECTIVES, *of_methods()} - {"balance"}  # its layers have routers: tests/methods/test_moh.py
    values = {name: float(loss) for name, loss in losses(names, student, teacher, torch.tensor([0.0, 3.0])).items()}
    # gate: shares 1/4 and 3/4 of scores 0 and log 3, against 1/2 and 1/2
    assert values.pop("gate") == pytest.approx(0.5 * math.log(4 / 3))
    # imitation: products of the maps 1 and 5/4, so shares 4/9 and 5/9, against 1/2 and 1/2
    assert values.pop("imitation") == pytest.approx(-0.5 * math.log(20 / 81))
    # flow: (1 + 0) / 2; teacher: (0 + 4) / 2; attention: (1 / 1 + 16 / 16) / 2; final: 1 / 4.
    assert values == {"flow": 0.5, "teacher": 2.0, "attention": 1.0, "final": 0.25, "consistency": 0.5}
