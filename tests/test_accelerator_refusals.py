"""What an accelerator refuses, and that a refusal changes nothing."""

import copy
import inspect

import pytest
import safetensors
import torch
from accelerated_state import WINDOW, run, state_of
from messages import names
from torch import nn

import dit_accel


def test_accelerating_twice_is_refused_unless_replaced(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    state = state_of(transformer)
    first = dit_accel.accelerate(transformer, "radial", decay=0.2)
    with pytest.raises(dit_accel.DitAccelError, match=names("radial remove()")):
        dit_accel.accelerate(transformer, "gna", **WINDOW)
    with pytest.raises(dit_accel.DitAccelError, match=names("0 1")):
        dit_accel.accelerate(transformer, "gna", replace=True, dense_layers=(9,), **WINDOW)
    assert first.active, "nothing took its place"
    second = dit_accel.accelerate(transformer, "gna", replace=True, **WINDOW)
    assert not first.active and first.remove() == []
    run(transformer, inputs)
    assert second.report().sparse_calls == 2 and first.report().sparse_calls == 0
    second.remove()
    assert state_of(transformer) == state


def test_pickling_is_refused_and_what_is_saved_is_the_models_own(tiny_wan, wan_inputs, tmp_path):
    """`save_pretrained` of the model leaves out the learned weights, which the accelerator's own has."""
    transformer = tiny_wan()
    model_keys = set(transformer.state_dict())
    with dit_accel.accelerated(transformer, "sla", topk=0.3, block=16) as accel:
        for part in (transformer, transformer.blocks[0], accel):
            with pytest.raises(dit_accel.DitAccelError, match=names("remove()")):
                torch.save(part, tmp_path / "model.pt")
        transformer.save_pretrained(tmp_path / "model")
        assert {"safe_serialization", "variant"} <= inspect.signature(transformer.save_pretrained).parameters.keys()
        assert len(accel.learned_weights()) == 2 and set(transformer.state_dict()) > model_keys
        run(transformer, wan_inputs())
    with safetensors.safe_open(tmp_path / "model" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == model_keys
    assert "save_pretrained" not in vars(transformer)


def test_what_is_no_grid_no_folder_and_no_schedule_is_refused(tiny_wan, tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    for message, call in {
        "TokenGrid": lambda: dit_accel.plan("gna", "4x8x8", window=3),
        "None": lambda: dit_accel.load(tiny_wan(), None),
        "layer_schedule": lambda: dit_accel.accelerate(tiny_wan(), layer_schedule={}),
        "deep.json": lambda: dit_accel.accelerate(tiny_wan(), layer_schedule=deep),
    }.items():
        with pytest.raises(dit_accel.DitAccelError, match=names(message)):
            call()


def test_a_copy_of_an_accelerated_transformer_is_refused(tiny_wan, wan_inputs):
    transformer = tiny_wan()
    with dit_accel.accelerated(transformer, "gna", **WINDOW):
        twin = copy.deepcopy(transformer)
        with pytest.raises(dit_accel.DitAccelError, match=names("copy")):
            run(twin, wan_inputs())
        for replace in (False, True):
            with pytest.raises(dit_accel.DitAccelError, match=names("copy")):
                dit_accel.accelerate(twin, "gna", replace=replace, **WINDOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "gnaa"}, "gnaa"),
        ({"method": "tile", "references": 2, "windw": 3}, "windw"),
        ({"impl": "fast"}, "impl"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"dense_layers": 3}, "2"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(change, message, tiny_wan):
    transformer = tiny_wan()
    state = state_of(transformer)
    arguments = {"method": "gna", **(WINDOW if "method" not in change else {}), **change}
    with pytest.raises(dit_accel.DitAccelError, match=names(message)):
        dit_accel.accelerate(transformer, **arguments)
    assert state_of(transformer) == state


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [("gna", {"window": (6, 5, 4)}, "frames"), ("tile", {"references": 6}, "references")],
)
def test_settings_that_do_not_fit_the_grid_stop_the_first_call(method, config, message, tiny_wan, wan_inputs):
    """Even if that call is a dense step: nobody wants to learn it at step 12."""
    with dit_accel.accelerated(tiny_wan(), method, dense_steps=1, **config) as accel:
        (transformer,) = accel.transformers.values()
        with pytest.raises(dit_accel.DitAccelError, match=names(message)):
            run(transformer, wan_inputs())


def test_unsupported_models_name_the_supported():
    for target, message in (
        (nn.Linear(1, 1), r"Linear is not supported: no family .*Supported families: .*flux.*wan"),
        ("a path", "str has no diffusion transformer"),
    ):
        with pytest.raises(dit_accel.DitAccelError, match=message):
            dit_accel.accelerate(target, "gna", **WINDOW)


def test_an_unsupported_transformer_of_a_pipeline_is_not_left_dense(tiny_wan):
    components = {"transformer": tiny_wan(), "transformer_2": nn.Linear(1, 1), "vae": None}
    target = type("Pipe", (), {"components": components})()
    with pytest.raises(dit_accel.DitAccelError, match=names("Linear")):
        dit_accel.accelerate(target, "gna", **WINDOW)


def test_a_processor_that_cannot_be_rebuilt_leaves_nothing_half_done(tiny_wan):
    class Silent:
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    transformer = tiny_wan()
    transformer.blocks[1].attn1.set_processor(Silent())
    state = state_of(transformer)
    with pytest.raises(dit_accel.DitAccelError, match=names("Silent")):
        dit_accel.accelerate(transformer, "sla", topk=0.3, block=16)
    assert state_of(transformer) == state


def test_what_cannot_take_its_place_does_not_cost_the_accelerator_at_work(tiny_wan, wan_inputs):
    class Silent:
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    transformer = tiny_wan()
    first = dit_accel.accelerate(transformer, "gna", **WINDOW)
    transformer.blocks[1].attn1.set_processor(Silent())
    state = state_of(transformer)
    with pytest.raises(dit_accel.DitAccelError, match=names("Silent")):
        dit_accel.accelerate(transformer, "radial", replace=True)
    assert first.active and state_of(transformer) == state
