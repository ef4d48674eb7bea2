"""Benchmarks: what is declared, settings for a density, the gate, rows and times."""

import dataclasses
import json
import sys
import types

import pytest
import torch
from messages import names
from method_settings import in_models

from dit_accel.bench import gate as bench_gate
from dit_accel.bench import rows as bench_rows
from dit_accel.bench import run as bench
from dit_accel.bench import shapes, timing
from dit_accel.bench.rows import OutOfReach, Row, Shape, Target
from dit_accel.bench.run import count
from dit_accel.errors import DitAccelError
from dit_accel.generation import provenance
from dit_accel.plans.sampled import SampledQueries
from dit_accel.registry import get_methods

# The fields that every kernel row of this project has.
FIELDS = (
    "op shape tokens heads head_dim density dtype direction impl ms_p50 ms_p20 ms_p80 tflops_kept baseline "
    "baseline_ms_p50 speedup max_error gpu driver torch triton git date"
).split()
TINY = Shape("tiny", (3, 6, 8), heads=2, head_dim=16, text=5, text_first=True)
GNA = Target.of("gna", window=(2, 3, 4), stride=(1, 3, 2))
SLA = Target.of("sla", topk=0.3, block=16)
CHOSEN_BY_CALL = ("sol", "rectified")  # their density follows from q and k
MARGINAL = Target.of("sla", topk=0.3, block=16, linear_scope="marginal")
STATIC = (GNA, Target.of("tile", references=1), Target.of("radial", decay=0.3))
OTHERS = [
    Target.of(name, **settings)
    for name, settings in in_models().items()
    if name not in ("gna", "tile", "radial", "sla", *CHOSEN_BY_CALL)
]
CPU = torch.device("cpu")


def row(target=GNA, dtype="float32", direction="forward", shape=TINY):
    return Row(shape, target, dtype, direction)


def outcome(target=GNA, **options):
    (result,) = bench.Bench(CPU, seconds=0).run([row(target, **options)])
    return result


class TestDeclared:
    def test_names_tell_rows_apart(self):
        names = [row.name for row in bench_rows.select()]
        assert len(set(names)) == len(names)

    def test_one_file_makes_a_shape(self, tmp_path, monkeypatch):
        """Elsewhere, too: nothing of the package lists it."""
        (tmp_path / "other.py").write_text(
            "from dit_accel.bench.rows import Shape\nSHAPES = (Shape('other', (2, 4, 4), heads=2),)\n"
        )
        monkeypatch.setattr(shapes, "__path__", [*shapes.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, "dit_accel.bench.shapes.other", raising=False)
        assert {row.shape.name for row in bench_rows.select(["other"])} == {"other"}
        assert "other" in bench_rows.get_shapes()

    def test_video_models_have_every_method_at_every_density_it_reaches(self):
        rows = bench_rows.select(shapes=["wan-14b-720p"], dtypes=["bfloat16"], directions=["forward"])
        pairs = {(row.target.method, row.target.density) for row in rows}
        assert {density for method, density in pairs if method == "gna"} == set(bench_rows.DENSITIES)
        assert {density for method, density in pairs if method == "tile"} == {0.2, 0.5, 1.0}

    @pytest.mark.parametrize(
        ("name", "tokens", "heads", "head_dim"),
        [
            ("wan-1.3b-480p", 32_760, 12, 128),
            ("wan-14b-480p", 32_760, 40, 128),
            ("wan-14b-720p", 75_600, 40, 128),
            ("hunyuan-720p", 118_800 + 256, 24, 128),
            ("mochi", 44_520 + 256, 24, 128),
            ("flux-2k", 16_384 + 512, 24, 128),
            ("flux-4k", 65_536 + 512, 24, 128),
            ("cogvideox", 17_550 + 226, 48, 64),
            ("cpu", 8_192, 4, 64),
            ("longca-64k-cp8", 65_536, 8, 128),
        ],
    )
    def test_shapes(self, name, tokens, heads, head_dim):
        shape = bench_rows.get_shape(name)
        assert (shape.tokens, shape.heads, shape.head_dim) == (tokens, heads, head_dim)
        assert shape.grid.tokens == tokens

    def test_filters_narrow_what_is_declared(self):
        rows = bench_rows.select(["cpu"], [Target("gna", None)], [1 / 8], ["float32"], ["forward"])
        assert [row.target.setting.config.window for row in rows] == [(8, 16, 8), (4, 16, 16)]
        assert len(bench_rows.select(pattern="mochi/*/0.1/*/forward")) == 8

    def test_what_is_asked_for_beyond_is_added(self):
        (added,) = bench_rows.select(["mochi"], [Target("gna", None)], [0.3], ["float16"], ["both"])
        assert added.name == "mochi/gna/0.3/float16/both"
        (added,) = bench_rows.select(["mochi"], [GNA], (), ["float16"], ["both"])
        assert added.name == "mochi/gna:window=2x3x4,stride=1x3x2/-/float16/both"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shapes": ["moshi"]}, "Did you mean 'mochi'?"),
            ({"densities": [0.0]}, "above 0"),
            ({"dtypes": ["int8"]}, "float32, bfloat16, float16; got 'int8'"),
            ({"directions": ["sideways"]}, "forward, backward, both"),
            ({"pattern": "moshi/*"}, "for example cpu/dense/1/"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(DitAccelError, match=message.replace("?", r"\?")):
            bench_rows.select(**options)


class TestSettings:
    @pytest.mark.parametrize("name", ["wan-1.3b-480p", "hunyuan-720p", "flux-4k", "cogvideox", "cpu", "longca-8k"])
    def test_they_reach_the_density(self, name):
        shape = bench_rows.get_shape(name)
        for target in shape.declared():
            density = target.setting_on(shape.grid).plan(shape.grid).density
            if density is None:
                assert target.method in CHOSEN_BY_CALL or target.setting
                continue
            # Methods of whole frames have a few steps to choose from; windows and shares of blocks are fine.
            loose = get_methods()[target.method].sparsest(shape.grid) > 0 or shape.text
            assert density == pytest.approx(target.density, rel=bench_rows.TOLERANCE if loose else 0.06), target

    def test_work_is_counted_without_computing(self):
        """Of 64 heads of 128 at 8,192 tokens: 4 operations a pair and dimension forward, 10 backward."""
        every = 64 * 128 * 8192**2 * 4e-12
        counts = {
            row.name.removesuffix("/bfloat16/forward"): count(row)
            for row in bench_rows.select(["longca-8k"], directions=["forward"])
        }
        causal = counts["longca-8k/gna:window=full,causal=True/0.500061"]
        assert causal["tflop"] == [pytest.approx(every * 8193 / 16384)] * 2 and causal["dense_tflop"] == every
        assert every > causal["block_tflop"] > causal["tflop"][0]  # blocks on the diagonal are computed whole
        routed = counts["longca-8k/sparge:topk=0.0,topp=0.5/-"]  # from one block of 64 keys in a row to all
        assert routed["tflop"] == [pytest.approx(every / 128), every] and routed["block_tflop"] is None
        assert set(routed["ulysses"]) == {2, 4, 8} and not causal["ulysses"]
        assert all(1 <= after < before < 2 for before, after in routed["ulysses"].values())
        shared = next(row for row in bench_rows.select(["longca-8k-cp8"], directions=["backward"]))
        assert count(shared)["tflop"][0] == pytest.approx(every / 8 * 2.5)

    def test_windows_are_whole_blocks_where_the_grid_is(self):
        grid = bench_rows.get_shape("hunyuan-768p").grid
        plan = Target("gna", 0.1).setting_on(grid).plan(grid)
        blocks = plan.block_mask()
        assert blocks.density == plan.density
        assert blocks.full == blocks.visited

    def test_radial_drops_its_sink_only_where_it_must(self):
        grid = bench_rows.get_shape("hunyuan-720p").grid
        assert Target("radial", 0.1).setting_on(grid).config.sink is False
        assert Target("radial", 0.2).setting_on(grid).config.sink is True

    @pytest.mark.parametrize("method", ["gna", "sla", "tile", "radial", "dense"])
    def test_everything_is_a_density_too(self, method):
        assert Target(method, 1.0).setting_on(TINY.grid).plan(TINY.grid).density == 1

    @pytest.mark.parametrize("method", ["tile", "radial", "dense"])
    def test_out_of_reach(self, method):
        with pytest.raises(OutOfReach, match=names("density", 0.05)):
            Target(method, 0.05).setting_on(bench_rows.get_shape("wan-1.3b-480p").grid)

    def test_a_method_without_a_rule(self, monkeypatch):
        silent = dataclasses.replace(get_methods()["gna"], at_density=None)
        monkeypatch.setattr(bench_rows, "get_methods", lambda: {"gna": silent})
        monkeypatch.setattr(bench_rows, "get_method", lambda name: silent)
        with pytest.raises(DitAccelError, match=names("gna")):
            Target("gna", 0.5).setting_on(TINY.grid)
        assert TINY.declared() == ()


class TestGate:
    @pytest.mark.parametrize("target", [*STATIC, Target.of("radial", rule="released", block=16)])
    @pytest.mark.parametrize("text_first", [True, False])
    def test_pairs_are_those_of_the_plan(self, target, text_first):
        shape = Shape("tiny", (4, 6, 8), heads=1, text=5, text_first=text_first)
        plan = target.setting.plan(shape.grid)
        rows = torch.tensor([0, 3, 7, 50, shape.tokens - 1])
        q = torch.randn(1, 1, shape.tokens, 8)
        assert torch.equal(SampledQueries(plan, rows, q, q, "auto").seen(0), plan.token_mask()[rows])

    def test_sums_over_hundreds_of_keys_keep_their_digits(self):
        """Summed in one product of all keys the error is 7.46e-7, and 7.01e-7 are allowed."""
        shape = Shape("long", (4, 16, 16), heads=2, head_dim=32, text=20, text_first=True)
        result = outcome(Target("gna", 0.3), shape=shape)
        assert result.status == "measured", result.reason

    def test_long_sequences_are_sampled_with_their_ends(self):
        grid = bench_rows.get_shape("mochi").grid
        rows = bench_gate.sample(grid)
        assert len(rows) < 300
        assert {0, grid.visual - 1, grid.visual, grid.tokens - 1} <= set(rows.tolist())
        assert len(rows.unique()) == len(rows)

    @pytest.mark.parametrize("target", [*STATIC, SLA, MARGINAL, *OTHERS])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_right_kernels_are_green(self, target, dtype):
        result = outcome(target, dtype=dtype, direction="both")
        assert result.status == "measured", result.reason
        weights = {"sla": {"dproj.weight", "dproj.bias"}, "proxy": {"dweight", "dbias"}}
        assert set(result.record["checks"]) == {"out", "dq", "dk", "dv"} | weights.get(target.method, set())

    @pytest.mark.parametrize(
        ("target", "weights"),
        [
            (Target.of("sla", topk=0.3, block=16, feature_map="hedgehog"), 4),
            (Target.of("clear", radius=3, pool=2), 1),
        ],
    )
    def test_gradients_of_all_weights_are_compared(self, target, weights):
        result = outcome(target, direction="both")
        assert result.status == "measured", result.reason
        assert len(result.record["checks"]) == 4 + weights

    @pytest.mark.parametrize("target", [GNA, SLA])
    def test_text_may_stand_last(self, target):
        result = outcome(target, direction="both", shape=dataclasses.replace(TINY, text_first=False))
        assert result.status == "measured", result.reason

    def test_sampled_gradients_are_those_of_the_sampled_queries(self, monkeypatch):
        monkeypatch.setattr(bench_gate, "PAIRS", 20 * TINY.tokens)
        result = outcome(SLA, direction="both")
        assert result.status == "measured", result.reason

    @pytest.mark.parametrize("target", [GNA, SLA])
    def test_a_wrong_output_is_red(self, monkeypatch, target):
        break_kernel(monkeypatch, "forward", lambda out, lse: (out * 1.001, lse))
        result = outcome(target)
        assert (result.status, result.record) == ("red", None)
        assert result.reason.startswith("out: error")

    def test_a_nan_is_red(self, monkeypatch):
        def poisoned(out, lse):
            out = out.clone()
            out[0, 0, 7, 3] = torch.nan
            return out, lse

        break_kernel(monkeypatch, "forward", poisoned)
        assert outcome().status == "red"

    @pytest.mark.parametrize("wrong", range(3))
    def test_a_wrong_gradient_is_red(self, monkeypatch, wrong):
        def scaled(*grads):
            return tuple(grad * (1.001 if i == wrong else 1) for i, grad in enumerate(grads))

        break_kernel(monkeypatch, "backward", scaled)
        assert outcome().status == "measured"
        assert outcome(direction="backward").reason.startswith(("dq", "dk", "dv")[wrong])

    def test_a_wrong_linear_branch_is_red(self, monkeypatch):
        from dit_accel.kernels.sla import portable

        right = portable.linear_all
        monkeypatch.setattr(portable, "linear_all", lambda *arguments: right(*arguments) * 1.001)
        assert outcome(SLA).status == "red"

    def test_a_wrong_router_is_red(self, monkeypatch):
        """Lists that are not the best ones, whoever attends to them."""
        from dit_accel.methods import sla

        right = sla.classify
        monkeypatch.setattr(sla, "classify", lambda q, *rest, **more: right(-q, *rest, **more))
        result = outcome(SLA)
        assert result.status == "red"
        assert result.reason.startswith("router")


def break_kernel(monkeypatch, name, change):
    from dit_accel.kernels.block_sparse import portable

    right = getattr(portable, name)
    monkeypatch.setattr(portable, name, lambda *arguments: change(*right(*arguments)))


class TestRecords:
    @pytest.mark.parametrize("direction", bench_rows.DIRECTIONS)
    def test_every_field_is_there(self, direction):
        record = outcome(direction=direction).record
        assert [name for name in FIELDS if name not in record] == []
        assert json.loads(json.dumps(record)) is not None
        assert record["density"] == GNA.setting.plan(TINY.grid).density
        assert record["tokens"] == TINY.grid.tokens
        assert record["speedup"] == record["baseline_ms_p50"] / record["ms_p50"]
        assert 0 < record["ms_p20"] <= record["ms_p50"] <= record["ms_p80"]
        assert (record["op"], record["impl"], record["gpu"], record["driver"]) == ("gna", "portable", None, None)
        assert record["cpu"] == provenance.processor()

    def test_operations_are_those_of_kept_pairs(self):
        record = outcome().record
        operations = 4 * TINY.heads * TINY.head_dim * GNA.setting.plan(TINY.grid).pairs
        assert record["tflops_kept"] == pytest.approx(operations / record["ms_p50"] / 1e9)

    def test_a_density_out_of_reach_is_said_and_not_measured(self):
        result = outcome(Target("tile", 0.05))
        assert (result.status, result.record) == ("out of reach", None)

    def test_a_setting_that_does_not_fit_is_refused_and_the_rest_goes_on(self):
        wrong = Target.of("gna", window=(4, 3, 4))
        first, second = bench.Bench(CPU, seconds=0).run([row(wrong), row()])
        assert (first.status, second.status) == ("refused", "measured")
        assert "window" in first.reason

    def test_the_peer_is_timed_or_has_a_reason(self, monkeypatch):
        """Another implementation stands in for FlexAttention, which has no gradients on a CPU."""
        from dit_accel.plans.static import MaskPlan

        right = MaskPlan.attend

        def attend(self, q, k, v, *, impl="auto", **call):
            if impl == "flex" and factor is None:
                raise RuntimeError("no compiler\nfurther lines")
            return right(self, q, k, v, impl="portable", **call) * (factor if impl == "flex" else 1)

        monkeypatch.setattr(MaskPlan, "attend", attend)
        factor = 1
        record = bench.Bench(CPU, seconds=0, peer=True).measure(row(direction="both"))
        assert record["peer"]["speedup"] == record["baseline_ms_p50"] / record["peer"]["ms_p50"]
        factor = 1.001
        assert "out: error" in bench.Bench(CPU, seconds=0, peer=True).measure(row())["peer"]["reason"]
        factor = None
        record = bench.Bench(CPU, seconds=0, peer=True).measure(row())
        assert record["peer"] == {"name": "flex_attention", "reason": "no compiler"}

    def test_flex_attention_does_not_compute_sla(self):
        record = bench.Bench(CPU, seconds=0, peer=True).measure(row(SLA))
        assert "flex" in record["peer"]["reason"] and "ms_p50" not in record["peer"]

    def test_unknown_implementation(self):
        with pytest.raises(DitAccelError, match=names("impl")):
            bench.Bench(CPU, impl="fast")

    def test_commit_is_that_of_this_checkout_or_nothing(self, root, monkeypatch, tmp_path):
        if (root / ".git").exists():
            assert len(provenance.commit().removesuffix("-dirty")) == 12
        monkeypatch.setattr(provenance, "ROOT", tmp_path)
        assert provenance.commit() is None


class TestTiming:
    def test_calls_take_turns(self):
        called = []
        calls = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
        milliseconds = timing.alternate(calls, 0, CPU, least=3)
        assert "".join(called) == "ab" * 4  # the first round does not count
        assert [len(times) for times in milliseconds.values()] == [3, 3]

    def test_time_is_the_calls(self, monkeypatch):
        """By a clock that stands still but for the calls: 5 ms and 20 ms a round, for at least 100 ms."""
        now = [0.0]

        def takes(seconds):
            now[0] += seconds

        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
        milliseconds = timing.alternate({"a": lambda: takes(0.005), "b": lambda: takes(0.020)}, 0.1, CPU, least=3)
        assert milliseconds == {"a": pytest.approx([5] * 4), "b": pytest.approx([20] * 4)}

    def test_quantiles(self):
        assert timing.quantiles([5, 1, 2, 4, 3, 6]) == {"ms_p50": 3.5, "ms_p20": 2, "ms_p80": 5}
