"""Evaluations written down in YAML."""

import itertools
import json

import pytest
import torch
from messages import names, says

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.eval import layout, suite
from dit_accel.generation import sources
from dit_accel.tokens import TokenGrid
from dit_accel.values import names_in


def read(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    return suite.read(str(tmp_path / "s.yaml"))


def test_values(tmp_path):
    values = read(
        tmp_path,
        "model: demo\ncompile: false\nseeds: [0, 2]\nguidance: 5\nmethods:\n  - gna:window=0.5\n"
        "  - {method: 'radial:decay=0.2', dense_steps: 2, dense_layers: [0, 3]}\n"
        "  - {method: tile:references=1, dense_layers: [5]}\n",
    )
    one, other, third = values.pop("methods")
    assert values == {"model": "demo", "compile": False, "seeds": (0, 2), "guidance": 5.0}
    assert (one.title, other.title) == ("gna:window=0.5", "radial:decay=0.2")
    assert other.label == "radial:decay=0.2 dense_steps=2 dense_layers=0,3"
    assert third.setting.schedule.dense_layers == (5,)  # that layer, not as many layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: demo", "'modle' 'model'"),
        ("steps: many", "steps 'many'"),
        ("steps: true", "steps True"),
        ("seeds: [0, x]", "seeds (0 'x')"),
        ("steps: 1\nsteps: 2", "steps"),
        ("methods: [{method: gna, dense_steps: 1, dense_steps: 2}]", "dense_steps"),
        ("[" * 100_000, "nested"),
        (
            "a: &a [0, 0]\n"
            + "".join(f"{k}: &{k} [*{j}, *{j}]\n" for j, k in itertools.pairwise("abcdefghijklmnopqrstu")),
            "100,000",
        ),
        ("methods: &m [*m]", "100,000"),
        ("- demo", "keys values 'demo'"),
        ("model: [", "YAML"),
        ("methods: [gnaa]", "'gna'"),
        ("steps: -1", "steps 1 -1"),
        ("methods: [{method: gna, window: 2}]", "method load level"),
        ("methods: [{dense_steps: 2}]", "method load level"),
        ("methods: [3]", "3"),
        ("methods: [{method: gna:window=2, dense_steps: many}]", "dense_steps >= 0"),
        ("methods: 5", "methods 5"),
        ("methods: false", "methods False"),
        ("published: 5", "published 5"),
        ("published: 0", "published 0"),
        ("published: figures", "name where source 'figures'"),
        ("methods: [{method: 'gna:window=0.5', published: 5}]", "published 5"),
    ],
)
def test_refused(tmp_path, text, message):
    with pytest.raises(DitAccelError) as error:
        read(tmp_path, text)
    assert says(str(error.value), message, tmp_path / "s.yaml")


def test_keys_without_a_value_are_those_left_out(tmp_path):
    assert read(tmp_path, "model: demo\nmethods:\npublished:\n") == {"model": "demo"}


def test_missing():
    with pytest.raises(DitAccelError, match=names("'demo'")):
        suite.read("dmo")


def test_the_demo_suite_is_a_grid():
    """Dense attention and four methods, each without a cache and with three; uncached dense is the baseline."""
    settings = [candidate.setting for candidate in suite.read("demo")["methods"]]
    cells = {(setting.title, str(setting.cache)) for setting in settings}
    titles, caches = ({cell[part] for cell in cells} for part in (0, 1))
    assert {setting.method for setting in settings} == {"dense", "gna", "tile", "sol", "sparge"} and len(titles) == 5
    assert len(caches) == 4 and len(settings) == len(cells) == len(titles) * len(caches) - 1


# Suites of published tables, the tokens of their call as the papers count them, and methods that they run.
PUBLISHED = {
    "wan2.1-1.3b": ("wan", (21, 30, 52), {"sol", "dense"}),
    "wan2.1-14b-720p": ("wan", (21, 45, 80), {"radial", "sol", "rectified", "sparge"}),
    "hunyuan-720p": ("hunyuan_video", (33, 45, 80), {"radial", "gna", "sol", "rectified", "sparge"}),
    "flux-4k": ("flux", (1, 256, 256), {"gna", "sol"}),
    "ltx": ("ltx2", (16, 32, 56), {"sol"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_suites_fit_their_models(name, wan_folder):
    """Every method makes a plan at the published size, and every figure has a source."""
    assert {*PUBLISHED, "demo"} == set(names_in(suite.SUITES))
    family, shape, methods = PUBLISHED[name]
    small = {"model": str(wan_folder), "height": 64, "width": 96}  # a level asks the model
    values = suite.read(name, small if name == "wan2.1-1.3b" else None)
    assert methods <= {candidate.method for candidate in values["methods"]}
    grid = TokenGrid(*shape, text={"hunyuan_video": 256, "flux": 512}.get(family, 0), text_first=family == "flux")
    for candidate in values["methods"]:
        assert candidate.plans(grid)
    labels = {candidate.label for candidate in values["methods"]}
    for entry in values["published"]:
        assert entry.source and entry.where and (not entry.label or entry.label in labels)
        assert entry.speedup > 1 and (entry.label or entry.psnr or entry.density)


@pytest.mark.parametrize(
    ("name", "folder", "size"),
    [
        ("wan2.1-1.3b", "wan_folder", ("--frames", 9, "--height", 96, "--width", 128, "--steps", 4, "--seeds", "0,1")),
        (
            "flux-4k",
            "flux_folder",
            ("--height", 208, "--width", 208, "--steps", 10, "--pipe", "max_sequence_length=9"),
        ),
    ],
)
def test_published_suites_run(name, folder, size, cli, request, tmp_path):
    """On a tiny random model of the same class; the report has the published figures beside the measured ones."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = (*size, "--model", request.getfixturevalue(folder), "--prompts", tmp_path / "prompts.txt")
    options += ("--pictures", 1, "--metric", "psnr", "--metric", "ssim")
    video = name == "wan2.1-1.3b"
    out = tmp_path / "out"
    outcome = cli("eval", "--suite", name, *options, *(("--layout", "vbench") if video else ()), "--output", out)
    assert outcome.status == 0, outcome.err
    needs = outcome.err.index("hours of an H100")
    assert "disk: " in outcome.err[:needs] and "memory: " in outcome.err[:needs]
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["label"] for row in summary["rows"]}
    published = {entry["name"]: entry for entry in summary["published"]}
    assert {entry["label"] for entry in published.values()} - {""} <= rows
    entry = next(entry for entry in published.values() if entry["label"])
    for report in ("summary.md", "report.html"):
        text = (out / report).read_text()
        assert f"{entry['speedup']:.2f}×" in text and entry["source"] in text
    if video:
        names = {path.name for path in (out / "vbench" / "baseline").iterdir()}
        assert names == {"a red circle-0.mp4", "a red circle-1.mp4"}
        assert len(list((out / "vbench").iterdir())) == len(rows)


def test_levels_and_published_figures(tmp_path):
    suite = read(
        tmp_path,
        "model: demo\nmethods:\n  - {level: fast, published: {name: A, where: B, source: C, speedup: 2}}\n"
        "published: [{name: D, where: E, source: F, psnr: 20}]\n",
    )
    (candidate,) = suite["methods"]
    assert [(entry.name, entry.label) for entry in suite["published"]] == [("A", candidate.label), ("D", "")]
    with pytest.raises(DitAccelError, match=names("name where source")):
        read(tmp_path, "published: [{name: D}]")


@pytest.mark.parametrize(("prompts", "frames"), [(["a/b"], 5), (["x" * 250], 5), (["a"], 1)])
def test_the_layout_of_vbench_refuses(prompts, frames):
    with pytest.raises(DitAccelError, match=names("--layout vbench")):
        layout.check(prompts, frames)


def test_folders_of_one_name_are_rows_whose_commands_load_them_as_here(cli, demo, tmp_path):
    setting = "gna:window=0.5 cache=steps:computed=0x1"
    folders = [tmp_path / place / "tuned" for place in ("a", "b")]
    pipe = sources.load(sources.find("demo"), torch.float32, torch.device("cpu"))
    for folder in folders:
        with dit_accel.accelerated(pipe, setting) as accel:
            accel.save_pretrained(folder)
    listed = [f"{{load: {folders[0]}, cache: none}}", *(f"{{load: {folder}}}" for folder in folders)]
    (tmp_path / "suite.yaml").write_text(f"methods: [{', '.join(listed)}]\nmetrics: [psnr]\n")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    size = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2, "--prompts", tmp_path / "prompts.txt")
    outcome = cli("eval", *size, "--suite", tmp_path / "suite.yaml", "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"][1:]
    labels = ["gna:window=0.5 from tuned", f"{setting} from a/tuned", f"{setting} from b/tuned"]
    assert [row["label"] for row in rows] == labels and rows[0]["cache"] is None
    loads = [row["command"].partition(" --load ")[2].split()[:-2] for row in rows]
    assert loads == [[str(folders[0]), "--cache", "none"], *([str(folder)] for folder in folders)]
