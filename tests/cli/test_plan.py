"""`dit-accel plan`."""

import importlib.util
import json

import pytest
import torch
from messages import says
from PIL import Image

import dit_accel
from dit_accel.registry import parse_method


def test_json_is_what_the_library_says(cli):
    arguments = ("--method", "gna:window=4x8x8", "--set", "stride=2x4x4", "--grid", "6x16x20", "--text", "5")
    facts = json.loads(cli("plan", *arguments, "--json").out)
    plan = dit_accel.plan("gna", dit_accel.TokenGrid(6, 16, 20, text=5), window=(4, 8, 8), stride=(2, 4, 4))
    blocks = plan.block_mask()
    assert facts["tokens"] == 6 * 16 * 20 + 5
    assert facts["pairs"] == plan.pairs
    assert facts["density"] == plan.density
    assert (facts["blocks_visited"], facts["blocks_total"]) == (blocks.visited, blocks.total)
    block = blocks.query_order.block * blocks.key_order.block
    assert facts["ideal_speedup"] == plan.grid.tokens**2 / (blocks.visited * block)
    assert facts["config"]["window"] == [4, 8, 8]


def test_ideal_speedup_is_the_density_where_blocks_fit(cli):
    """A window of whole tiles on a grid of whole tiles: nothing is padded, nothing is partial."""
    facts = json.loads(cli("plan", "--method", "gna:window=4x16x16,stride=4x16x16", "--grid", "8x32x32", "--json").out)
    assert facts["density"] == facts["block_density"] == 1 / 8
    assert facts["ideal_speedup"] == 8


@pytest.mark.parametrize(("method", "grid"), [("agent", "1x1x1"), ("heads", "4x8x8"), ("tile:references=4", "4x8x8")])
def test_settings_that_a_run_refuses_are_said(cli, method, grid):
    refused = json.loads(cli("plan", "--method", method, "--grid", grid, "--json").out)["refused"]
    assert says(refused, method.partition(":")[0], grid, "'dense'")
    assert refused in " ".join(cli("plan", "--method", method, "--grid", grid).out.split())
    allowed = cli("plan", "--method", "gna:window=3", "--grid", "4x8x8", "--json").out
    assert json.loads(allowed)["refused"] is None


def test_text_first_counts(cli):
    facts = json.loads(cli("plan", "--method", "dense", "--grid", "1x2x2", "--text", "3", "--text-first", "--json").out)
    assert facts["grid"]["text_first"] is True
    assert facts["density"] == 1


def test_published_setting_of_hunyuan(cli):
    """The setting of GNA for HunyuanVideo: 91 % sparse, and perfectly block-sparse in tiles."""
    facts = json.loads(cli("plan", "--method", "gna:window=18x24x24,stride=16x8x8", "--grid", "30x48x80", "--json").out)
    assert facts["pairs"] == 115_200 * 18 * 24 * 24
    assert facts["density"] == pytest.approx(0.09)
    assert facts["blocks_full"] == facts["blocks_visited"]


@pytest.mark.parametrize("method", ["dense", "gna:window=2", "tile:references=1", "radial", "sla"])
def test_every_method_has_a_table(cli, method):
    outcome = cli("plan", "--method", method, "--grid", "4x8x8")
    assert outcome.status == 0, outcome.err
    facts = json.loads(cli("plan", "--method", method, "--grid", "4x8x8", "--json").out)
    assert says(outcome.out, method.partition(":")[0], "256", f"{facts['pairs']:,}", f"{facts['density']:.4f}")


@pytest.mark.parametrize("method", ["sol", "sol:sink=70", "sparge", "sparge:topk=0.3,topp=0", "rectified:topp=0"])
def test_routed_methods_have_bounds(cli, method):
    """Where all scores are equal, sol keeps what it always keeps."""
    grid = dit_accel.TokenGrid(4, 9, 9, text=5)
    arguments = ("plan", "--method", method, "--grid", "4x9x9", "--text", "5")
    low, high = json.loads(cli(*arguments, "--json").out)["pairs_bounds"]
    name, config = parse_method(method)
    plan, random = dit_accel.plan(name, grid, **config), torch.randn(2, 1, 2, grid.tokens, 8)
    pairs = []
    for q, k in (random, 0 * random):
        density = torch.zeros(2)
        plan.add_density(plan.route(q, k), density)
        pairs.append(density[0].item() * grid.tokens**2)
    assert 0 < low <= min(pairs) * (1 + 1e-6) and max(pairs) <= high * (1 + 1e-6) and low < grid.tokens**2
    assert name != "sol" or pairs[1] == pytest.approx(low)
    table = cli(*arguments).out
    assert says(table, *([f"{high:,}"] if plan.pairs else [f"{low:,}", f"{grid.tokens**2:,}"]))


def test_picture(cli, tmp_path):
    outcome = cli("plan", "--method", "radial", "--grid", "8x8x8", "--image", tmp_path / "mask.png")
    assert outcome.status == 0, outcome.err
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.width >= 8


def test_grid_of_a_wan_model_comes_from_its_json(cli, wan_folder, tmp_path):
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((wan_folder / name).read_bytes())
    size = ("--frames", 9, "--height", 64, "--width", 96)
    facts = json.loads(cli("plan", "--method", "radial", "--model", tmp_path, *size, "--json").out)
    assert [facts["grid"][axis] for axis in ("frames", "height", "width")] == [3, 4, 6]
    assert facts["grid"]["text"] == 0


def test_grid_of_a_flux_model_has_its_text_first(cli, flux_folder):
    out = cli("plan", "--method", "gna:window=0.5", "--model", flux_folder, "--height", 32, "--width", 64, "--json").out
    grid = json.loads(out)["grid"]
    assert grid == {"frames": 1, "height": 8, "width": 16, "text": 512, "text_first": True, "conditioning": 0}


def test_grid_of_the_demo_defaults_to_its_own_size(cli, demo):
    from dit_accel.pipelines.demo import DEFAULTS

    facts = json.loads(cli("plan", "--method", "radial:decay=0.5", "--model", "demo", "--json").out)
    assert facts["tokens"] == DEFAULTS.tokens


@pytest.mark.parametrize("method", ["dense", "gna:window=8", "tile:references=2", "radial", "radial:rule=released"])
def test_grids_of_more_blocks_than_fit_are_refused(cli, method):
    """Ten million tokens with text: 80,002 x 160,004 blocks of 128 and 64 tokens."""
    outcome = cli("plan", "--method", method, "--grid", "64x400x400", "--text", "256")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert says(outcome.err, "33,554,432 64x400x400 256 128")


def test_too_many_blocks_are_refused_before_tiles_are_chosen(cli):
    outcome = cli("plan", "--method", "gna:window=8", "--grid", "1x40000x50000")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert says(outcome.err, "33,554,432")


@pytest.mark.parametrize("method", ["tile:references=3", "radial"])
def test_tables_of_frame_pairs_have_a_limit(cli, method):
    """A hundred thousand frames have 10^10 pairs of frames."""
    outcome = cli("plan", "--method", method, "--grid", "100000x10x10")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert says(outcome.err, "2,048 100,000")


def test_a_picture_has_the_mark_and_needs_matplotlib(cli, tmp_path, monkeypatch):
    from dit_accel.files import is_ours

    arguments = ("plan", "--method", "gna:window=3x5x7", "--grid", "5x9x11", "--image", tmp_path / "mask.png")
    assert cli(*arguments).status == 0
    assert is_ours(tmp_path / "mask.png")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    outcome = cli(*arguments)
    assert outcome.status == 2 and says(outcome.err, "matplotlib", "'dit_accel[plot]'")


def test_a_preset_and_a_level_of_a_model(cli):
    facts = json.loads(cli("plan", "--model", "demo", "--preset", "--set", "tau=0.5", "--json").out)
    assert (facts["method"], facts["config"]["tau"], facts["config"]["block_q"]) == ("sol", 0.5, 128)
    facts = json.loads(cli("plan", "--model", "demo", "--preset", "--method", "radial", "--json").out)
    assert facts["config"]["rule"] == "released"
    size = ("--height", "224", "--width", "256", "--json")
    small, large = (
        json.loads(cli("plan", "--model", "demo", "--level", "fast", *more).out) for more in (["--json"], size)
    )
    assert {small["method"], large["method"]} == {"dense"} and "cache=steps:computed=0x1x4" in small["setting"]
    assert says(large["notes"][0], "8,064") and large["setting"] in large["notes"][0]
    facts = json.loads(cli("plan", "--model", "demo", "--level", "fast", "--gpu", "sm_90", *size).out)
    assert facts["method"] == "dense" and says(facts["notes"][0], "GPU")  # too short for one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "4x8x8"], "--method --level --preset balanced"),
        (["--model", "demo"], "--method sol radial faithful"),
        (["--grid", "4x8x8", "--level", "fast"], "--model --level"),
        (["--grid", "4x8x8", "--preset"], "--model --preset"),
        (["--model", "demo", "--level", "fast", "--method", "sol"], "--level --method"),
        (["--model", "demo", "--preset", "--method", "tile"], "tile sol radial"),
    ],
)
def test_a_missing_method_names_what_there_is(cli, arguments, words):
    outcome = cli("plan", *arguments)
    assert outcome.status == 2 and says(outcome.err, words), outcome.err


def test_a_level_is_that_of_the_steps(cli):
    """Of 4 steps no cache leaves one out; of the demo's own 12 the level is a cache."""
    arguments = ("plan", "--model", "demo", "--level", "fast", "--json")
    settings = [json.loads(cli(*arguments, *steps).out)["setting"] for steps in ((), ("--steps", 4))]
    assert settings == ["dense cache=steps:computed=0x1x4", "dense"]


def test_the_table_shows_schedule_and_cache(cli):
    out = cli("plan", "--method", "sol dense_steps=2 cache=mag:threshold=0.1", "--grid", "4x8x8").out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["dense_steps"].strip() == "2" and rows["cache"].strip() == "mag:threshold=0.1"
    assert "sparse" in rows["figures"]
    assert "figures" not in cli("plan", "--method", "sol", "--grid", "4x8x8").out


def test_dense_attention_has_no_speedup_over_itself(cli):
    """Its blocks pad 320 tokens to 384, and the model's own code has no blocks."""
    assert "ideal_speedup" not in json.loads(cli("plan", "--method", "dense", "--grid", "5x8x8", "--json").out)


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--grid", "4x8x8", "--head-dim", 64), "--head-dim"), (("--model", "demo", "--steps", 4), "--steps")],
)
def test_options_without_effect_are_refused(cli, options, named):
    outcome = cli("plan", "--method", "sol", *options)
    assert (outcome.status, outcome.out) == (2, "") and says(outcome.err, named)


@pytest.mark.parametrize(
    ("options", "head_dim"),
    [(("--model", "demo"), 64), (("--model", "demo", "--head-dim", 128), 128), (("--grid", "4x8x8"), 128)],
)
def test_kernels_are_those_for_the_models_heads(cli, options, head_dim):
    """A head of another size can take another kernel."""
    facts = json.loads(cli("plan", "--method", "sol", "--gpu", "sm_90", *options, "--json").out)
    assert facts["head_dim"] == head_dim
    plan = {
        "sm_90": [
            row._asdict()
            for row in dit_accel.plan("sol", dit_accel.TokenGrid(4, 8, 8)).implementation("sm_90", head_dim=head_dim)
        ]
    }
    assert facts["implementation"] == plan
