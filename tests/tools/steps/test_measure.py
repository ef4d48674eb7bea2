"""Steps of whole models: what is declared, and rows of models of the real classes made small."""

import dataclasses
import json

import pytest
import torch
from messages import names

from dit_accel.bench import gate as bench_gate
from dit_accel.bench import results
from dit_accel.bench.rows import Target
from dit_accel.errors import DitAccelError
from tools.steps import measure as steps_tool
from tools.steps import models as declared
from tools.steps.models import ModelStep, get_model, select_steps

CPU = torch.device("cpu")
# The fields that every row of a whole model has.
FIELDS = (
    "model method config step_ms_p50 dense_step_ms_p50 speedup attention_share peak_memory_bytes "
    "gpu arch driver torch triton git date"
).split()
SMALL = {
    "wan-14b-480p": {
        "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 32, "num_layers": 2
    },
    "hunyuan-720p": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
        "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
    },
    "flux-4k": {
        "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
    },
    "cogvideox": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "time_embed_dim": 8, "text_embed_dim": 16,
        "use_rotary_positional_embeddings": True,
    },
}  # fmt: skip
SLA = Target.of("sla", topk=0.5, block=16)
GNA = Target.of("gna", window=(1, 3, 4))


def small(name):
    """The declared model with a small architecture at a small size."""
    model = get_model(name)
    axes = (1, 8, 9) if name == "flux-4k" else (4, 6, 8)
    shape = dataclasses.replace(model.shape, axes=axes, text=model.shape.text and 7)
    return dataclasses.replace(model, shape=shape, config=SMALL[name], text=model.text and 7)


def sized(model, axes):
    return dataclasses.replace(model, shape=dataclasses.replace(model.shape, axes=axes))


def measure(*steps, **options):
    return list(steps_tool.StepBench(CPU, seconds=0, dtype=torch.float32, **options).run(steps))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("wan-1.3b-480p", 1.4e9),
        ("wan-14b-720p", 14.3e9),
        ("hunyuan-720p", 12.8e9),
        ("flux-4k", 11.9e9),
        ("cogvideox", 5.6e9),
    ],
)
def test_models_have_the_published_size(name, parameters):
    """Counted without memory; published: 1.3, 14, 13, 12 and 5 billion, to the digits of their cards."""
    model = get_model(name).build(torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("name", SMALL)
def test_a_row_of_each_class(name):
    model = small(name)
    (outcome,) = measure(ModelStep(model, GNA, "eager"))
    assert outcome.status == "measured", outcome.reason
    record = outcome.record
    assert set(FIELDS) <= set(record)
    json.dumps(record)
    assert record["grid"] == str(model.shape.grid)
    assert record["row"] == f"{name}/gna:window=1x3x4/published/eager"
    assert record["sparse_layers"] == record["layers"] >= 1
    assert record["speedup"] == pytest.approx(record["dense_step_ms_p50"] / record["step_ms_p50"])
    assert record["attention_share"] == pytest.approx(1 - record["rest_ms_p50"] / record["step_ms_p50"])


def test_compiled_blocks_and_methods_in_turn():
    model = small("wan-14b-480p")
    steps = [ModelStep(model, setting, mode) for mode in ("eager", "compiled") for setting in (GNA, SLA)]
    outcomes = measure(*steps, backend="eager")
    assert [outcome.status for outcome in outcomes] == ["measured"] * 4, [outcome.reason for outcome in outcomes]
    assert [outcome.record["mode"] for outcome in outcomes] == ["eager", "eager", "compiled", "compiled"]


def test_published_settings_keep_their_dense_layers():
    (step,) = select_steps(["wan-14b-480p"], [Target("radial", None)], modes=["eager"], pattern="*/published/*")
    (outcome,) = measure(dataclasses.replace(step, model=sized(small("wan-14b-480p"), (12, 12, 16))))
    assert outcome.status == "measured", outcome.reason
    assert (outcome.record["layers"], outcome.record["sparse_layers"]) == (2, 1)


def test_what_is_not_exact_is_not_timed(monkeypatch):
    def inexact(*arguments, **options):
        raise bench_gate.Inexact("out: error 1, at most 0 allowed")

    monkeypatch.setattr("tools.steps.measure.check", inexact)
    (outcome,) = measure(ModelStep(small("wan-14b-480p"), GNA, "eager"))
    assert (outcome.status, outcome.record) == ("red", None)


def test_what_cannot_be_measured_keeps_nothing_else_from_it():
    model = small("wan-14b-480p")
    broken = sized(model, (0, 6, 8))
    too_large = Target.of("gna", window=9)
    steps = [ModelStep(broken, GNA, "eager"), ModelStep(model, too_large, "eager"), ModelStep(model, GNA, "eager")]
    outcomes = measure(*steps)
    assert [outcome.status for outcome in outcomes] == ["refused", "refused", "measured"]


class TestDeclared:
    def test_every_method_at_ten_per_cent_and_as_published(self):
        names = [step.name for step in select_steps(["wan-14b-720p"], modes=["eager"])]
        methods = {"gna", "proxy", "radial", "rectified", "sla", "sol", "sparge", "tile"}
        assert {name.split("/")[1] for name in names if name.endswith("/0.1/eager")} == methods
        assert any("/published/" in name and "radial" in name for name in names)

    def test_images_have_no_methods_of_frames(self):
        routed = {"proxy", "rectified", "sla", "sol", "sparge"}
        assert {step.target.method for step in select_steps(["flux-4k"])} == {"clear", "gna", *routed}

    def test_names_tell_steps_apart(self):
        names = [step.name for step in select_steps()]
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"models": ["wan-14b-720"]}, "wan-14b-720p"),
            ({"modes": ["fast"]}, "fast"),
            ({"pattern": "nothing"}, "row"),
        ],
    )
    def test_what_is_unknown_is_refused(self, arguments, words):
        with pytest.raises(DitAccelError, match=names(words)):
            select_steps(**arguments)


class TestCommand:
    @pytest.fixture
    def tool(self, monkeypatch, capsys):
        """Runs the tool, which knows one model, small enough for a processor."""
        wan = sized(get_model("wan-14b-480p"), (3, 6, 8))
        wan = dataclasses.replace(wan, config=SMALL["wan-14b-480p"] | {"num_layers": 1}, text=7)
        monkeypatch.setattr(declared, "MODELS", (wan,))

        def run(*arguments):
            monkeypatch.setattr("sys.argv", ["measure", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                steps_tool.main()
            return stop.value.code, *capsys.readouterr()

        return run

    def test_rows_table_and_resume(self, tool, tmp_path):
        output = tmp_path / "rows.jsonl"
        run = ("--device", "cpu", "--seconds", "0", "--shape", "wan-14b-480p", "--mode", "eager")
        run += ("--method", "gna:window=1x3x4", "--output", output)
        status, out, err = tool(*run)
        assert status == 0, err
        assert "rest ms" in out
        (record,) = results.read(output, "model")
        assert f"{record['step_ms_p50']:.1f}" in tool("--read", output)[1]
        assert str(output) in tool(*run, "--resume")[2]

    def test_list(self, tool):
        assert "wan-14b-480p/gna/0.1/compiled" in tool("--list")[1].split()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--device", "cpu"), "this machine has no GPU"),
            (("--list", "--density", "7"), "above 0 and at most 1, such as 0.1; got 7.0"),
            (("--list", "--rows", ""), "No declared row matches ''"),
        ],
    )
    def test_bad_input(self, tool, arguments, words):
        status, out, err = tool(*arguments)
        assert (status, out) == (2, "") and words in err
