"""Conversion to linear attention: the objective that imitates softmax maps, in runs of the small pipeline."""

import dataclasses

import pytest
import torch
from messages import names

import dit_accel
from dit_accel.methods.sla import IMITATION, SparseLinearAttention, imitated
from dit_accel.train import state
from dit_accel.train.data import Dataset
from dit_accel.train.objectives import Outputs, losses
from dit_accel.train.settings import make

LINEAR = {"method": "sla", "config": {"topk": 0.0, "feature_map": "hedgehog"}}


def test_imitation_brings_the_maps_nearer_to_softmax(tiny, trained):
    """The cross-entropy falls by most of its distance to the entropy of the softmax weights, which is its least."""
    output = trained(steps=40, rate=0.03, objectives={"imitation": 1.0}, save_every=40, **LINEAR)
    pipe, calls = tiny.load(), []
    sample = Dataset(tiny.data)[0]
    with dit_accel.load(pipe, output) as accel, accel.watch(calls.append), torch.no_grad():
        pipe.transformer(hidden_states=sample.latents, timestep=torch.tensor([700.0]), **sample.call)
        modules = list(accel.learned_weights().values())
    assert len(calls) == len(modules) == 2
    least, after, before = [], [], []
    for module, call in zip(modules, calls, strict=True):
        weights = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5).softmax(-1)
        least.append(torch.special.entr(weights).sum(-1).mean())
        fresh = SparseLinearAttention(call.q.shape[-1], **LINEAR["config"])
        for entropies, linear in ((after, module), (before, fresh)):
            seen = dataclasses.replace(call, module=linear)
            entropies.append(imitated(seen).detach())
    least, after, before = (float(torch.stack(values).mean()) for values in (least, after, before))
    assert least < after < (least + before) / 2


def test_with_distillation_and_recomputed_activations(trained):
    """All losses fall together, and recomputation changes none: each layer's call is recorded once."""
    objectives = {"flow": 0.5, "teacher": 1.0, "imitation": 0.1}
    runs = [
        state.read_losses(trained(name=str(on), objectives=objectives, checkpointing=on, **LINEAR) / "losses.jsonl")
        for on in (False, True)
    ]
    assert runs[0] == runs[1] and set(runs[0][0]) == {"step", "loss", "rate", *objectives}


def test_what_has_no_learned_map_is_refused(tiny):
    for settings in ({"method": "gna", "config": {"window": 3}}, {"method": "sla"}):
        with pytest.raises(dit_accel.DitAccelError, match=names("imitation", "sla", "feature_map=hedgehog")):
            make({"objectives": {"imitation": 1.0}, **settings})
    pipe, sample, calls = tiny.load(), Dataset(tiny.data)[0], []
    with dit_accel.accelerate(pipe, "sla") as accel, accel.watch(calls.append):  # as with a layer schedule
        pipe.transformer(hidden_states=sample.latents, timestep=torch.tensor([700.0]), **sample.call)
    assert calls and [IMITATION.record(call) for call in calls] == [None] * len(calls)
    with pytest.raises(dit_accel.DitAccelError, match="imitation"):
        losses(["imitation"], Outputs(sample.latents), None, sample.latents)
