"""Putting a model's own weights back after it was moved, cast or offloaded."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from published_weights import moved, snapshot, unchanged

import dit_accel
from dit_accel.checkpoint.lora import Trained
from dit_accel.checkpoint.model_weights import NewWeight, replace

NAMES = ("blocks.0.attn1.to_q.weight", "blocks.1.scale_shift_table", "proj_out.bias")
CPU = torch.device("cpu")


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


@pytest.fixture
def tuned(tiny_wan):
    """An accelerator whose transformer has some weights of a fine-tuning."""
    model = tiny_wan()
    other = moved(model)
    weights = {name: NewWeight((name,), tuple(other[name].shape), lambda old, n=name: other[n]) for name in NAMES}
    accel = dit_accel.accelerate(model, "dense")
    record = Trained(model="tiny", revision=None, fingerprints={}, changed={"transformer": NAMES})
    accel.take_training(record, replace(model, weights))
    assert not unchanged(model, snapshot(tiny_wan()))
    return accel


def sequential(model):
    accelerate.cpu_offload(model, execution_device=CPU)


def by_group(model):
    devices = {"onload_device": CPU, "offload_device": CPU}
    apply_group_offloading(model, **devices, offload_type="leaf_level")


def no_longer(model):
    sequential(model)
    accelerate.hooks.remove_hook_from_submodules(model)


@pytest.mark.parametrize("offload", [sequential, by_group, no_longer])
def test_an_offloaded_model_is_what_it_was(offload, tuned, tiny_wan, wan_inputs):
    base, inputs = tiny_wan(), wan_inputs()
    model = tuned.transformers["transformer"]
    offload(model)
    assert not torch.equal(run(model, inputs), run(base, inputs))
    tuned.remove()
    assert torch.equal(run(model, inputs), run(base, inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_model_has_its_weights_in_the_new_dtype(dtype, tuned, tiny_wan):
    model = tuned.transformers["transformer"].to(dtype)
    tuned.remove()
    wanted = tiny_wan().to(dtype).state_dict()
    assert all(value.dtype == dtype and torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_model_that_was_tuned_in_inference_mode(tiny_wan):
    model, other = tiny_wan(), moved(tiny_wan())
    with torch.inference_mode():
        undo = replace(
            model, {NAMES[0]: NewWeight(NAMES[:1], tuple(other[NAMES[0]].shape), lambda old: other[NAMES[0]])}
        )
    undo()
    assert unchanged(model, snapshot(tiny_wan()))


def test_weights_on_a_disk_are_refused_before_anything_is_undone(tuned, tiny_wan, wan_inputs, tmp_path):
    model, inputs = tuned.transformers["transformer"], wan_inputs()
    accelerate.disk_offload(model, tmp_path, execution_device=CPU)
    before = run(model, inputs)
    with pytest.raises(dit_accel.DitAccelError, match="remove_all_hooks"):
        tuned.remove()
    assert tuned.active and torch.equal(run(model, inputs), before)
    accelerate.hooks.remove_hook_from_submodules(model)
    tuned.remove()
    assert unchanged(model, snapshot(tiny_wan()))
