"""`dit-accel eval` on small models of the real classes: what it writes, how it goes on, what it refuses."""

import json
import os
import shlex

import numpy as np
import pytest
from messages import says
from PIL import Image

from dit_accel.cli.eval import show
from dit_accel.eval import verdict
from dit_accel.files import hold
from dit_accel.generation import output

SIZE = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2)
METRICS = ("--metric", "psnr", "--metric", "ssim", "--metric", "temporal_psnr")
GNA = "gna:window=0.5"
TIMES = {"seconds", "denoising_seconds", "seconds_per_step", "attention_seconds", "date"}


@pytest.fixture
def evaluate(cli, demo, tmp_path):
    """Runs an evaluation of two prompts into `tmp_path / folder`; gives the outcome."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")

    def run(*options, folder="out", metrics=METRICS):
        return cli(
            "eval", *SIZE, "--prompts", tmp_path / "prompts.txt", *metrics, *options, "--output", tmp_path / folder
        )

    return run


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def fits_80_columns(printed):
    """Whether nothing is cut and every line fits but commands, which are one line each, to be copied."""
    lines = [line for line in printed.splitlines() if not line.startswith("  dit-accel ")]
    return "…" not in printed and max(map(len, lines)) <= 80


class TestResults:
    def test_levels_are_rows(self, evaluate, tmp_path):
        """Levels with one setting share a row, and their notes say so."""
        levels = [option for level in ("faithful", "balanced", "fast") for option in ("--level", level)]
        outcome = evaluate("--steps", 12, "--method", "dense", *levels, "--seeds", 0)
        assert outcome.status == 0, outcome.err
        rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
        forecast = ",reuse=output,damping=0.6"
        lists = (f"0x1x3x6x10{forecast}", f"0x1x3x7{forecast}", "0x1x4")
        settings = [f"dense cache=steps:computed={steps}" for steps in lists]
        assert [row["label"] for row in rows] == ["baseline", "dense", *settings]
        assert all(row["figures"]["psnr"]["value"] != "inf" for row in rows[2:])
        outcome = evaluate("--steps", 2, *levels, "--seeds", 0, folder="few")
        assert outcome.status == 0, outcome.err
        rows = json.loads((tmp_path / "few" / "summary.json").read_text())["rows"]
        assert [row["label"] for row in rows] == ["baseline", "dense"]
        outcome = evaluate("--level", "slow", folder="b")
        assert outcome.status == 2 and says(outcome.err, "level faithful balanced fast slow")

    def test_files_and_figures(self, evaluate, tmp_path, clip_folder):
        networks = [f"{name}[{clip_folder}]" for name in ("perceptual", "fid", "kid", "clip_score", "frame_agreement")]
        named = [option for name in networks for option in ("--metric", name)]
        options = ("--method", "dense", "--method", GNA, "--seeds", "0-2", "--pictures", 1)
        options += ("--attention-report", "steps=1,layers=all")
        outcome = evaluate(*options, metrics=(*METRICS, *named))
        assert outcome.status == 0, outcome.err
        out = tmp_path / "out"
        for name in ("report.html", "summary.json", "summary.md", "results.jsonl"):
            assert (out / name).stat().st_size > 0
        summary = json.loads((out / "summary.json").read_text())
        assert [row["label"] for row in summary["rows"]] == ["baseline", "dense", GNA]
        perfect, dense, gna = summary["rows"]
        for row in (perfect, dense):  # `accelerate(pipe, "dense")` is the untouched pipeline, bit for bit
            assert row["figures"]["psnr"]["value"] == row["figures"]["temporal_psnr"]["value"] == "inf"
            assert row["figures"]["ssim"]["value"] == pytest.approx(1)
            assert row["figures"]["perceptual[tiny-clip]"]["value"] == 0
            assert abs(row["figures"]["fid[tiny-clip]"]["value"]) < 1e-3 * gna["figures"]["fid[tiny-clip]"]["value"]
            assert row["density"] == 1
        assert 5 < gna["figures"]["psnr"]["value"] < 60
        assert gna["figures"]["perceptual[tiny-clip]"]["value"] > 0
        assert gna["figures"]["psnr"]["samples"] == gna["samples"] == 6
        assert 0 < gna["density"] < 1
        for row in summary["rows"]:
            assert 0 < row["attention_seconds"]["p50"] < row["loop_seconds"]["p50"] <= row["loop_seconds"]["p95"]
        assert summary["made"]["real_set"] == "the dense outputs"
        assert summary["made"]["seeds"] == [0, 1, 2]
        assert {sample["prompt"] for sample in summary["samples"]} == {"a red circle"}
        assert all((out / sample["media"]).exists() for sample in summary["samples"])
        assert [mask["row"] for mask in summary["masks"]] == [GNA]
        maps = {entry["row"]: entry for entry in summary["attention"]}
        assert maps[GNA]["steps"] == [1] and len(maps[GNA]["layers"]) == 2
        assert all(0 < mass < 1 for mass in maps[GNA]["mass"][0][0])
        rows = results(out)
        assert [row["label"] for row in rows] == ["baseline", "dense", GNA] * 6
        assert rows[1]["scores"]["psnr"] == "inf"
        assert rows[1]["sha256"] == rows[0]["sha256"] != rows[2]["sha256"]
        assert rows[2]["sparse_calls"] == 4  # 2 layers, 2 steps

    def test_the_terminal_shows_whole_figures_and_the_verdict(self, evaluate, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        outcome = evaluate("--method", GNA, "--method", "radial:decay=0.123456789,rule=released,block=32,sink=false")
        assert outcome.status == 0, outcome.err
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert fits_80_columns(outcome.out.partition("report:")[0])
        for row in summary["rows"][1:]:
            assert f"{row['speedup']:.2f}" in outcome.out and f"{row['figures']['psnr']['value']:.4g}" in outcome.out
        assert summary["verdict"][0]["text"] in " ".join(outcome.out.split())

    @pytest.mark.parametrize("seconds", [1e-6, 1.0, 1e6])
    def test_the_terminal_shows_any_times(self, seconds, monkeypatch, capsys):
        """Also those by which a setting gains: its command is one line, to be copied."""
        monkeypatch.setenv("COLUMNS", "80")
        label = "radial:decay=0.123456789,rule=released,block=32,sink=false"
        psnr = {"name": "psnr", "title": "PSNR", "unit": "dB", "better": "higher"}

        def row(label, seconds, value, **others):
            return {
                "label": label, "speedup": 1e3 / seconds, "density": 0.5, "cache": None, "command": f"generate {label}",
                "attention_speedup": None, "peak_bytes": None,
                "speedup_interval": [999 / seconds, 1001 / seconds],
                "attention_seconds": {"p50": seconds / 2}, "loop_seconds": {"p50": seconds},
                "figures": {"psnr": {"value": value, "interval": [20.0, 30.0]}},
            } | others  # fmt: skip

        command = f"dit-accel generate --model demo --prompt 'a red circle' --method {label}"
        rows = [row("baseline", 1e3, "inf", density=1.0), row(label, seconds, 25.0, command=command)]
        lines = verdict.decide(rows, [psnr], [], 2304)
        show({"metrics": [psnr], "rows": rows, "verdict": lines, "made": {"left_out": []}})
        shown = capsys.readouterr().out
        assert fits_80_columns(shown) and f"{1e3 / seconds:.2f}×" in shown
        assert f"  {command}\n" in shown or seconds > 1e3

    def test_the_command_of_a_row_generates_its_sample(self, evaluate, cli, tmp_path, monkeypatch):
        from dit_accel.generation import captioned

        methods = "seeds: [3]\nmethods:\n  - {method: '" + GNA + "', dense_layers: [1], dense_steps: 1}\n"
        (tmp_path / "suite.yaml").write_text(methods)
        outcome = evaluate("--suite", tmp_path / "suite.yaml", "--guidance", 2, "--pictures", 1)
        assert outcome.status == 0, outcome.err
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        command = shlex.split(summary["rows"][1]["command"])
        assert command[:2] == ["dit-accel", "generate"] and "--dense-layers" in command and "1," in command
        monkeypatch.chdir(tmp_path)
        outcome = cli(*command[1:])
        assert outcome.status == 0, outcome.err
        (shown,) = [sample for sample in summary["samples"] if sample["row"] == summary["rows"][1]["label"]]
        again, before = (
            captioned.read_frames(path) for path in (tmp_path / "out.mp4", tmp_path / "out" / shown["media"])
        )
        assert np.array_equal(again, before)

    def test_images(self, cli, flux_folder, tmp_path):
        options = ("--model", flux_folder, "--height", 32, "--width", 48, "--steps", 2, "--metric", "psnr")
        prompts = tmp_path / "p.txt"
        prompts.write_text("a fox\n")
        options += ("--pipe", "max_sequence_length=16", "--prompts", prompts, "--method", GNA)
        outcome = cli("eval", *options, "--output", tmp_path / "out")
        assert outcome.status == 0, outcome.err
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["samples"][0]["media"].endswith(".png")

    def test_limits_set_the_status(self, evaluate):
        outcome = evaluate("--method", GNA, "--require", "psnr>=90,density<=0.9")
        assert outcome.status == 1
        (line,) = [line for line in outcome.err.splitlines() if line.startswith(f"dit-accel: {GNA}: ")]
        assert says(line, "psnr>=90")
        assert evaluate("--method", GNA, "--require", "psnr>=1,density<=0.9").status == 0

    def test_frames_that_are_not_finite_are_no_perfect_score(self, evaluate, tmp_path):
        outcome = evaluate("--method", GNA, "--guidance", 1e38, "--require", "psnr>=20")
        assert outcome.status == 2
        line = outcome.err.splitlines()[-1]
        assert "WanPipeline produced NaN or infinite values, first in step 1, transformer.blocks.0." in line
        assert not list((tmp_path / "out").rglob("*.safetensors")) and not (tmp_path / "out" / "summary.json").exists()

    def test_too_few_images_leave_a_metric_out(self, evaluate, tmp_path, monkeypatch, clip_folder):
        """A metric that was asked for by name is refused before the work."""
        from dit_accel.eval import metric

        usual = [(metric.known()["psnr"], None), (metric.known()["fid"], str(clip_folder))]
        monkeypatch.setattr(metric, "defaults", lambda embedded: usual)
        outcome = evaluate("--method", GNA, metrics=())
        assert outcome.status == 0, outcome.err
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert [metric["name"] for metric in summary["metrics"]] == ["psnr"]
        remark = "fid[tiny-clip] needs 120 images in each set, and this run generates 10"
        assert summary["made"]["left_out"] == [remark] and remark in " ".join(outcome.out.split())
        assert evaluate("--method", GNA, metrics=("--metric", f"fid[{clip_folder}]"), folder="b").status == 2

    def test_real_set(self, evaluate, tmp_path, clip_folder):
        (tmp_path / "set").mkdir()
        frames = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), dtype=np.uint8)
        output.write_frames(tmp_path / "set" / "a.gif", frames, fps=8)
        options = ("--real", tmp_path / "set", "--seeds", "0-2", "--method", GNA)
        outcome = evaluate(*options, metrics=("--metric", f"fid[{clip_folder}]"))
        assert outcome.status == 0, outcome.err
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["made"]["real_set"] == f"{tmp_path / 'set'}, 30 images"
        assert summary["rows"][0]["figures"]["fid[tiny-clip]"]["value"] > 0.01  # the baseline is not the set


class TestGoingOn:
    def test_finished_samples_are_not_made_again(self, evaluate, tmp_path):
        evaluate("--method", GNA)
        before = results(tmp_path / "out")
        outcome = evaluate("--method", GNA, "--method", "tile:references=1")
        assert "all samples" in outcome.err and "2/2" in outcome.err  # the progress of what was new
        after = results(tmp_path / "out")
        assert [row for row in after if row["label"] != "tile:references=1"] == before
        assert len(after) == 6

    def test_damage_is_named_and_mended(self, evaluate, tmp_path):
        evaluate("--method", GNA)
        out = tmp_path / "out"
        before = results(out)
        lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
        (out / "results.jsonl").write_text(lines[0] + lines[1][:40] + "\n" + "".join(lines[2:]) + '{"key": "cut')
        frames = out / "baseline" / f"{before[2]['key']}.safetensors"
        frames.write_bytes(frames.read_bytes()[:-9])
        outcome = evaluate("--method", GNA)
        assert says(outcome.err, "results.jsonl 2")
        assert says(outcome.err, "results.jsonl 5")
        assert says(outcome.err, frames)
        assert without_times(results(out)) == without_times(before)

    def test_a_kill_between_frames_and_line_leaves_no_trace(self, evaluate, tmp_path):
        evaluate("--method", GNA)
        out = tmp_path / "out"
        before = results(out)
        assert before[2]["label"] == "baseline"
        (out / "results.jsonl").write_text("".join((out / "results.jsonl").read_text().splitlines(keepends=True)[:2]))
        evaluate("--method", GNA)
        after = results(out)
        assert after[:3] == before[:3]  # the baseline with its times: its frames were whole
        assert without_times(after) == without_times(before)

    def test_a_folder_takes_one_evaluation_at_a_time(self, evaluate, tmp_path):
        with hold(tmp_path / "out"):
            before = sorted(tmp_path.rglob("*"))
            outcome = evaluate("--method", GNA)
            assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
            assert f"--output {tmp_path / 'out'} is in use by process {os.getpid()} on" in outcome.err
            assert sorted(tmp_path.rglob("*")) == before
        assert evaluate("--method", GNA).status == 0

    def test_dense_outputs_are_shared(self, evaluate, tmp_path):
        cache = ("--baselines", tmp_path / "cache")
        evaluate("--method", GNA, *cache, folder="a")
        files = sorted((tmp_path / "cache").iterdir())
        evaluate("--method", "tile:references=1", *cache, folder="b")
        assert sorted((tmp_path / "cache").iterdir()) == files
        assert [row["cached"] for row in results(tmp_path / "b")] == [True, False] * 2
        evaluate("--method", GNA, "--guidance", 2, *cache, folder="c")
        assert len(list((tmp_path / "cache").iterdir())) == 4

    def test_a_loaded_accelerator_and_a_suite(self, evaluate, demo, tmp_path):
        import dit_accel
        from dit_accel.pipelines.demo import load_demo

        with dit_accel.accelerated(load_demo(folder=demo), "sla", topk=0.3, block=16) as accel:
            accel.save_pretrained(tmp_path / "saved")
        text = f"seeds: [3]\nmethods:\n  - {{load: {tmp_path / 'saved'}}}\n  - {{method: '{GNA}', dense_steps: 1}}\n"
        (tmp_path / "suite.yaml").write_text(text)
        outcome = evaluate("--suite", tmp_path / "suite.yaml")
        assert outcome.status == 0, outcome.err
        rows = results(tmp_path / "out")
        assert [row["seed"] for row in rows] == [3] * 6
        sla, gna = rows[1:3]
        assert sla["label"].startswith("sla:topk=0.3") and sla["label"].endswith("from saved")
        assert gna["label"] == f"{GNA} dense_steps=1"
        assert (gna["sparse_calls"], gna["dense_calls"]) == (2, 2)


@pytest.fixture
def refused(evaluate, tmp_path):
    """Runs what should be refused; returns the line it was refused with."""

    def run(*options, metrics=METRICS) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = evaluate(*options, metrics=metrics)
        assert outcome.status == 2, outcome
        assert outcome.out == ""
        (line,) = outcome.err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return line.removeprefix("dit-accel: error: ")

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--method"),
        (("--method", "gnaa"), "gna"),
        (("--method", GNA, "--method", GNA), GNA),
        (("--method", "tile:references=4"), "references"),
        (("--dense-steps", 1), "--method"),
        (("--method", GNA, "--metric", "lipps"), "lipps lpips"),
        (("--method", GNA, "--require", "psnr"), "--require"),
        (("--method", GNA, "--require", "pnsr>2"), "pnsr psnr"),
        (("--method", GNA, "--attention-report", "step=1"), "steps=0,8-15,layers=0,1"),
        (("--method", GNA, "--seeds", "3-1"), "--seeds"),
        (("--method", GNA, "--seeds", f"3,0-{10**30}"), "10,000"),
        (("--method", GNA, "--prompts", "none.txt"), "--prompts none.txt"),
        (("--method", GNA, "--real", "none"), "--real"),
        (("--method", GNA, "--frames", 4), "3 5"),
        (("--suite", "none.yaml"), "suite none.yaml YAML"),
        (("--load", "none"), "--load"),
        (("--method", GNA, "--write-card"), "--load"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_refused(refused, options, message):
    assert says(refused(*options), message)


def test_real_sets_that_do_not_do(refused, tmp_path, clip_folder):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    options = ("--method", GNA, "--real", folder)
    line = refused(*options, "--seeds", "0-2", metrics=("--metric", f"fid[{clip_folder}]"))
    assert line.startswith("fid[tiny-clip] needs 25 images in each set, and the real set has 1")
    Image.new("RGB", (16, 24)).save(folder / "b.png")
    assert says(refused(*options), "a.png 16x16 b.png 24x16")
    (folder / "b.png").write_bytes(b"no picture")
    assert says(refused(*options), "b.png")


@pytest.mark.parametrize("option", ["--output", "--baselines"])
def test_folders_that_are_files(cli, demo, tmp_path, option):
    (tmp_path / "file").write_text("")
    outcome = cli("eval", *SIZE, "--method", GNA, "--output", tmp_path / "out", option, tmp_path / "file")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert f"{option} {tmp_path / 'file'} is a file. Give a folder" in outcome.err


def test_a_map_that_cannot_be_written_is_one_line(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "attention").write_text("")
    outcome = evaluate("--method", GNA, "--attention-report", "steps=0")
    assert outcome.status == 2
    assert "json could not be written: File exists." in outcome.err.splitlines()[-1]


def test_compiled(evaluate, tmp_path, monkeypatch):
    """Whole graphs for every method in turn, all of them from the warm-ups; without a C++ compiler, so not lowered."""
    from diffusers import WanTransformer3DModel
    from torch._dynamo.utils import counters

    from dit_accel.eval import sweep

    graphs = []
    timed = sweep.sample

    def counted(*call):
        before = counters["stats"]["unique_graphs"]
        sampled = timed(*call)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return sampled

    monkeypatch.setattr(sweep, "sample", counted)

    compile_blocks = WanTransformer3DModel.compile_repeated_blocks

    def traced(self, *, fullgraph):
        compile_blocks(self, fullgraph=fullgraph, backend="eager")

    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", traced)
    outcome = evaluate("--method", GNA, "--method", "tile:references=1", "--compile")
    assert outcome.status == 0, outcome.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["attention_seconds"] for row in summary["rows"]] == [None] * 3  # a hook would break the graph
    assert summary["rows"][1]["density"] < 1
    assert counters["stats"]["unique_graphs"] > 0
    assert graphs == [0] * 6, "a timed sample compiled something"
