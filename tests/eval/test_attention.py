"""The attention-level report: layers × steps of error and kept softmax mass."""

import pytest
import torch
from messages import names
from torch.nn import functional

from dit_accel import accelerated
from dit_accel.errors import DitAccelError
from dit_accel.eval.attention import AttentionRecord, MapChoice, parse_choice, record_attention

LAYERS = ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1", "transformer.blocks.2.attn1"]


@pytest.fixture
def run(tiny_wan, wan_inputs):
    """A transformer of three layers, and what runs it over three denoising steps, two calls a step as in guidance."""
    transformer = tiny_wan(layers=3)

    def calls(accel):
        for step in range(3):
            accel.set_step(step, 3)
            for _ in range(2):
                transformer(**wan_inputs(timestep=900 - 300 * step))

    return transformer, calls


def test_cells_are_the_errors_of_their_layer_and_step(run):
    """All queries sampled, against dense attention on whole matrices."""
    transformer, calls = run
    seen = []
    with accelerated(transformer, "gna", window=3, dense_layers=(1,), dense_steps=1) as accel:
        with accel.watch(seen.append):
            record = record_attention(accel, lambda: calls(accel), queries=10**6)
    assert record.steps == [0, 1, 2] and record.layers == LAYERS
    assert set(record.error) == set(record.mass) == {(layer, step) for layer in LAYERS[::2] for step in (1, 2)}
    for (layer, step), heads in record.error.items():
        in_cell = [call for call in seen if (f"transformer.{call.layer}", call.step.index) == (layer, step)]
        assert len(in_cell) == 2 and in_cell[0].q.shape[:2] == (2, len(heads))
        names = ("q", "k", "v", "out")
        q, k, v, out = (torch.cat([getattr(call, name) for call in in_cell]).double() for name in names)
        dense = functional.scaled_dot_product_attention(q, k, v)
        expected = ((out - dense).square().sum((0, 2, 3)) / dense.square().sum((0, 2, 3))).sqrt()
        assert heads == pytest.approx(expected.tolist(), rel=1e-4)  # the measure works in fp32
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        mass = (weights * in_cell[0].plan.token_mask()).sum(-1).mean((0, 2))
        assert record.mass[layer, step] == pytest.approx(mass.tolist(), rel=1e-4)

    shown = record.as_json()
    assert shown["error"][1] == [None, None, None] and shown["error"][0][0] is None
    assert shown["error"][2][1] == record.error[LAYERS[2], 1] and shown["mass"][0][2] == record.mass[LAYERS[0], 2]


def test_keeping_every_pair_is_perfect_and_less_is_worse(run):
    transformer, calls = run
    records = {}
    for window in ("full", 5, 3):
        with accelerated(transformer, "gna", window=window) as accel:
            records[window] = record_attention(accel, lambda accel=accel: calls(accel), steps=(1,))
    key = LAYERS[0], 1
    assert max(records["full"].error[key]) < 1e-5 and records["full"].mass[key] == pytest.approx([1, 1])
    for head in range(2):
        assert records["full"].error[key][head] < records[5].error[key][head] < records[3].error[key][head]
        assert records["full"].mass[key][head] > records[5].mass[key][head] > records[3].mass[key][head]


def test_chosen_steps_and_layers_only(run):
    transformer, calls = run
    with accelerated(transformer, "gna", window=3) as accel:
        record = record_attention(accel, lambda: calls(accel), steps=(0, 2), layers=(1,))
        assert record.as_json()["layers"] == LAYERS[1:2] and set(record.error) == {(LAYERS[1], 0), (LAYERS[1], 2)}
        with pytest.raises(DitAccelError, match=names("7 0 2")):
            record_attention(accel, lambda: calls(accel), steps=(0, 7))
        with pytest.raises(DitAccelError, match=names("transformer 3 0 2")):
            record_attention(accel, lambda: calls(accel), layers=(3,))
    with accelerated(transformer, "dense") as accel:
        assert record_attention(accel, lambda: calls(accel), steps=(0,)).as_json()["error"] == [[None]] * 3


def test_the_worst_layers_come_first():
    error = {("a", 0): [0.1, 0.2], ("a", 1): [0.3], ("b", 0): [0.9], ("c", 1): [0.05]}
    assert AttentionRecord([0, 1], ["a", "b", "c"], 8, error, error).worst(2) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("steps=0,8-10,layers=1,0", MapChoice((0, 8, 9, 10), (0, 1))),
        ("steps=3", MapChoice((3,), None)),
        ("layers=2-3,steps=4,1", MapChoice((1, 4), (2, 3))),
        ("steps=all, layers=0", MapChoice(None, (0,))),
    ],
)
def test_choices_are_read(text, choice):
    assert parse_choice(text) == choice


@pytest.mark.parametrize(
    "text", ["", "steps", "steps=", "steps=1,2,", "steps=-1", "layers=1,steps=x", "step=1", "steps=1,steps=2"]
)
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(DitAccelError, match=names("steps=0,8-15,layers=0,1")):
        parse_choice(text)


def test_spans_count_up():
    with pytest.raises(DitAccelError, match=names("9-3")):
        parse_choice("steps=9-3")
