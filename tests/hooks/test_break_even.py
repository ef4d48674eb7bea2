"""Where dense attention is faster: the table, what it is made from, and the accelerator that asks it."""

import dataclasses
import json

import pytest
import torch

import dit_accel
from dit_accel.hooks import break_even
from dit_accel.hooks.break_even import BreakEven, dense_is_faster, from_rows

CPU = torch.device("cpu")
CONFIG = {"window": (3, 5, 4)}
ROW = {"direction": "forward", "impl": "triton", "op": "gna", "arch": "sm_90", "head_dim": 12, "tokens": 300}


def rows(*points, **other):
    return [{**ROW, "git": "c", "density": density, "speedup": speedup, **other} for density, speedup in points]


@pytest.fixture
def measured(monkeypatch):
    """As if this processor were a GPU of compute capability 9.0, with these entries in the table."""

    def make(*entries):
        monkeypatch.setattr(break_even, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(break_even, "load", lambda: entries)

    return make


def entry(density=0.1, arch="sm_90", method="gna", head_dim=12, tokens=300):
    return BreakEven(arch, method, head_dim, tokens, density, "rows.jsonl at c")


def test_a_table_beside_the_module_takes_effect(tmp_path, monkeypatch):
    monkeypatch.setattr(break_even, "TABLE", tmp_path / "break_even.json")
    assert break_even.load.__wrapped__() == ()
    break_even.TABLE.write_text(json.dumps([dataclasses.asdict(entry())]))
    assert break_even.load.__wrapped__() == (entry(),)


def test_nothing_is_expected_of_what_was_not_measured(measured):
    assert dense_is_faster(CPU, "gna", 12, 300, 1.0) is None
    measured(entry(arch="sm_80"), entry(method="tile"), entry(head_dim=64))
    assert dense_is_faster(CPU, "gna", 12, 300, 1.0) is None


def test_the_nearest_size_decides(measured):
    measured(entry(0.5, tokens=1000), entry(0.2, tokens=100_000))
    assert dense_is_faster(CPU, "gna", 12, 9_000, 0.3) is None
    reason = dense_is_faster(CPU, "gna", 12, 11_000, 0.3)
    assert reason == "density 0.3000 is above 0.2000, where dense is faster on sm_90 (rows.jsonl at c)"
    assert dense_is_faster(CPU, "gna", 12, 11_000, 0.2) is None


def test_entries_from_rows():
    """On a line of slope -1 between (0.2, 2) and (0.8, 0.5) the speed-up is 1 at 0.4."""
    (found,) = from_rows(rows((0.8, 0.5), (0.2, 2.0), (0.1, 4.0)), "rows.jsonl")
    assert found == entry(0.4)


@pytest.mark.parametrize(
    ("points", "density"),
    [
        ([(0.1, 4.0), (1.0, 1.1)], None),
        ([(0.1, 0.9), (1.0, 0.5)], 0.0),
        ([(0.1, 0.9), (0.2, 2.0), (0.8, 0.5)], 0.4),
        ([(0.5, 1.0), (1.0, 0.5)], 0.5),
    ],
)
def test_where_the_speed_up_falls_to_one(points, density):
    assert [found.density for found in from_rows(rows(*points), "rows.jsonl")] == ([] if density is None else [density])


@pytest.mark.parametrize("other", [{"direction": "both"}, {"impl": "portable"}, {"op": "sla"}])
def test_other_rows_make_no_entries(other):
    assert from_rows(rows((0.1, 0.5), **other), "rows.jsonl") == []


class TestAccelerator:
    def layers(self, tiny_wan, wan_inputs, method="gna", config=None, **options):
        transformer, inputs = tiny_wan(), wan_inputs()
        with torch.no_grad():
            untouched = transformer(**inputs, return_dict=False)[0]
            with dit_accel.accelerated(transformer, method, **(config or CONFIG), **options) as accel:
                result = transformer(**inputs, return_dict=False)[0]
                layers = accel.report().layers
        return layers, torch.equal(result, untouched)

    def test_runs_the_models_own_attention_and_says_why(self, measured, tiny_wan, wan_inputs):
        measured(entry(0.1))
        layers, equal = self.layers(tiny_wan, wan_inputs)
        assert equal
        density = dit_accel.plan("gna", dit_accel.TokenGrid(5, 7, 9), **CONFIG).density
        reason = f"density {density:.4f} is above 0.1000, where dense is faster on sm_90 (rows.jsonl at c)"
        assert [(layer.sparse_calls, layer.dense_reasons) for layer in layers] == [(0, {reason: 1})] * 2

    @pytest.mark.parametrize(
        "options",
        [{"allow_dense": False}, {"impl": "portable"}, {"method": "sla", "config": {"topk": 0.9, "block": 16}}],
        ids=["not-allowed", "named", "learned"],
    )
    def test_stays_sparse(self, measured, tiny_wan, wan_inputs, options):
        measured(entry(0.0), entry(0.0, method="sla"))
        layers, equal = self.layers(tiny_wan, wan_inputs, **options)
        assert not equal
        assert [(layer.sparse_calls, layer.dense_calls) for layer in layers] == [(1, 0)] * 2

    def test_stays_sparse_below_the_break_even(self, measured, tiny_wan, wan_inputs):
        measured(entry(0.999))
        layers, _ = self.layers(tiny_wan, wan_inputs)
        assert [layer.sparse_calls for layer in layers] == [1, 1]

    def test_the_kernel_reported_for_sla_is_its_own_choice(self, tiny_wan, wan_inputs, monkeypatch):
        """Blocks of 128 tokens suit the block-sparse kernels, but not those over marginal blocks."""
        config = {"topk": 0.4, "skip": 0.1, "block": 128, "linear_scope": "marginal"}
        plan = dit_accel.plan("sla", dit_accel.TokenGrid(5, 7, 9), **config)
        cuda = torch.device("cuda")
        name, why = plan.prepare(cuda, torch.float16, 64, learned=True)
        reason = "the kernels over marginal blocks take blocks of up to 128 queries and 64 keys, not 128 and 128"
        assert (name, why) == ("portable", reason)
        assert plan.prepare(cuda, torch.float16, 64)[0] == "triton"
        layers, _ = self.layers(tiny_wan, wan_inputs, "sla", config)
        assert [layer.kernels for layer in layers] == [{"portable": "the fastest on cpu"}] * 2
