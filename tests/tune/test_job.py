"""The search: its rounds, its fronts, and a whole one on a small model whose pick is on the front that it measured."""

import json
import random

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from messages import says

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.eval import sweep
from dit_accel.eval.report import fields
from dit_accel.generation.candidate import BASELINE, Candidate
from dit_accel.setting import Setting
from dit_accel.tune import job, space
from dit_accel.tune.request import TuneRequest
from dit_accel.tune.rounds import Pace, Round, affordable, rounds

SMALL = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 2)


def test_rounds_halve_the_settings_and_double_the_steps():
    assert rounds(48, 50) == [(48, 3), (24, 6), (12, 12), (6, 25), (3, 50)]
    assert rounds(5, 2) == [(5, 2), (3, 2)] and job.rounds(3, 1) == [(3, 1)]


def test_the_command_to_try_has_the_size_that_was_tuned():
    request = TuneRequest(target="2x", frames=17, height=128, width=128, pipe=("shift=3",))
    said = "dit-accel generate --model demo --frames 17 --height 128 --width 128 --pipe shift=3 --load s.json"
    assert request.command(load="s.json") == said


def test_a_pace_counts_every_call():
    """By hand: two prompts; 3 settings and dense on 4 steps, then 2, dense and 1 that joined on 8."""
    pace = Pace.of({"seconds": 5.0, "denoising_seconds": 4.0, "seconds_per_step": 0.5})
    assert pace == (0.5, 1.0)
    assert pace.seconds([Round(3, 4), Round(2, 8)], 2, 1) == 4 * (2 * 3.0 + 1.5) + 4 * (2 * 5.0 + 1.5)


def test_short_time_leaves_out_the_layer_search_and_then_settings():
    tried = [Candidate(Setting.make("gna", {"window": window})) for window in (3, 5, 7)]
    tried += [Candidate(Setting.make("sol", {"tau": tau})) for tau in (1.0, 1.5, 2.0)]
    facts = {"steps": 8, "prompts": 2, "stacked": 3, "layer_steps": 100}
    pace = Pace(step=1.0, overhead=2.0)

    def fitting(minutes):
        part = affordable(tried, minutes, pace, **facts)
        assert part.seconds <= 60 * minutes
        return part

    whole = fitting(1e6)
    assert whole.settings == tried and whole.layers
    short = fitting(whole.seconds / 60 - 0.01)
    assert short.settings == tried and not short.layers
    less = fitting(short.seconds / 60 - 0.01)
    assert less.settings == [*tried[:3], *tried[3:5]] and not less.layers
    one = fitting(pace.seconds([Round(1, 8)], 2, 3) / 60)
    assert one.settings == tried[:1]
    with pytest.raises(DitAccelError) as error:
        fitting(one.seconds / 60 - 0.01)
    assert says(str(error.value), "--minutes")


def test_a_search_with_little_time(cli, demo, tmp_path, gaining):
    """`gaining` says 9 s a dense call of 2 steps; every method has a setting at 0.3 first."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    out = tmp_path / "out"
    options = ("--prompts", tmp_path / "prompts.txt", "--output", out, "--cache", "none", "--dense-steps", 0)
    methods = [option for name in ("gna", "tile", "sol") for option in ("--method", name)]
    search = ("tune", *SMALL, "--target", "1.01x", *options, *methods, "--minutes")
    outcome = cli(*search, 0.4)  # a setting, perhaps a second in Morton order, and dense take 13.5 s each
    assert outcome.status == 2 and says(outcome.err, "--minutes", 0.4)
    outcome = cli(*search, 0.95)
    assert outcome.status == 0, outcome.err
    assert says(outcome.err, 0.95, 2, 4.5) and not (out / "layers").exists()
    rows = json.loads((out / "round-1" / "summary.json").read_text())["rows"]
    assert [row["label"].partition(":")[0] for row in rows[1:]] == ["gna", "tile"]
    assert says(cli("tune", "--calibrate", 0.9, "--output", out, "--minutes", 1).err, "--minutes", "--target")


def test_fronts_against_their_definition():
    generator = random.Random(0)
    points = [(generator.randrange(8), generator.randrange(8)) for _ in range(60)]
    numbers = fields.fronts(points)
    for front in range(max(numbers) + 1):
        left = [point for point, number in zip(points, numbers, strict=True) if number >= front]
        best = {(x, y) for x, y in left if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in left)}
        assert best == {point for point, number in zip(points, numbers, strict=True) if number == front}


def test_the_nearest_to_the_target_come_first_in_a_front():
    psnr = {"name": "psnr", "unit": "dB", "better": "higher"}
    rows = [{"label": str(i), "speedup": s, "figures": {"psnr": {"value": p}}} for i, (s, p) in enumerate(POINTS)]
    rows = [row | dict.fromkeys(job.gates.FIGURES[1:]) for row in rows]
    for target, expected in (("speedup>=1.5", "10324"), ("psnr>=20", "23104")):
        ordered = job.order(rows, [psnr], job.gates.parse(target))
        assert "".join(row["label"] for _, row in ordered) == expected
        assert [number for number, _ in ordered] == [0, 0, 0, 0, 1]


POINTS = [(1.1, 40.0), (1.5, 30.0), (2.2, 20.0), (2.0, 25.0), (1.2, 29.0)]


@pytest.fixture
def gaining(monkeypatch):
    """Times that a sparse setting gains: this small, none does. The frames and all else stay what they are."""
    timed = []
    measure = sweep.sample

    def faster(pipe, arguments, seed, title, device, progress=None):
        sampled = measure(pipe, arguments, seed, title, device, progress)
        timed.append(title)
        label = title.partition(" ")[2]
        seconds = 9.0 if label == BASELINE else random.Random(label).uniform(3.0, 8.0)
        return sweep.dataclasses.replace(sampled, denoising_seconds=seconds)

    monkeypatch.setattr(sweep, "sample", faster)
    return timed


def test_from_prompts_to_a_pick_on_the_measured_front(cli, demo, tmp_path, gaining, monkeypatch):
    """The second layer gives nothing away, so a layer search finds better settings than equal ones."""
    from dit_accel.pipelines import demo as embedded

    pipe = embedded.load_demo(folder=demo)
    torch.nn.init.zeros_(pipe.transformer.blocks[1].attn1.to_out[0].weight)
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "model")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\n")
    settings = [f"sparge:topk={share},topp=0,block=4,block_q=8" for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)]
    methods = [option for method in settings for option in ("--method", method)]
    command = ("tune", *SMALL, "--target", "1.5x", *methods, "--dense-steps", 0, "--prompts", prompts, "--output", out)
    command = (*command, "--cache", "none")
    outcome = cli(*command)
    assert outcome.status == 0, outcome.err
    (round_1, last) = (json.loads((out / f"round-{n}" / "summary.json").read_text()) for n in (1, 2))
    tried, finalists = ({row["label"]: row for row in summary["rows"][1:]} for summary in (round_1, last))
    layered = [label for label in finalists if label not in tried]
    assert len(finalists) - len(layered) == -(-len(tried) // 2)
    assert layered and all(label.startswith(f"sparge:layers={out}") for label in layered)

    content = json.loads((out / "settings.json").read_text())
    picked = finalists[content["tuned"]["row"]]
    assert picked["speedup"] >= 1.5
    for row in finalists.values():  # nothing that was measured is better in both
        psnr, best = (float(result["figures"]["psnr"]["value"]) for result in (row, picked))
        assert not (row["speedup"] >= picked["speedup"] and psnr >= best) or row is picked
    assert f"--load {out / 'settings.json'}" in " ".join(outcome.out.split())

    with dit_accel.accelerate(pipe, layer_schedule=out / "settings.json") as accel:
        pipe("a red circle", num_frames=5, height=32, width=32, num_inference_steps=2, output_type="latent")
        report = accel.report()
    calls = report.sparse_calls + report.dense_calls
    sparse = sum(layer.sparse_calls * (layer.density or 0) for layer in report.layers)
    assert (sparse + report.dense_calls) / calls == pytest.approx(picked["density"], abs=0.02)

    gaining.clear()
    before = (out / "settings.json").read_bytes()
    assert cli(*command).status == 0
    assert gaining == [] and (out / "settings.json").read_bytes() == before  # nothing is run again


def test_morton_order_is_tried_where_nobody_typed_the_settings():
    finalists = [Candidate(Setting.make("gna", {"window": 3})), Candidate(Setting.make("sol", {"tau": 1.0}))]
    for methods, titles in (
        ((), ["sol:order=morton"]),
        (("sol",), ["sol:order=morton"]),
        (("sol:tau=1.5",), []),
    ):
        more = space.stacked(TuneRequest(target="2x", method=methods), finalists, [])
        assert [candidate.title for candidate in more] == titles


def test_the_last_round_tries_step_caches(cli, demo, tmp_path, gaining):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = ("--method", "sparge:topk=0.5,topp=0,block=4,block_q=8", "--prompts", tmp_path / "prompts.txt")
    outcome = cli(
        "tune", *SMALL[:-1], 6, "--target", "1.1x", *options, "--dense-steps", 0, "--output", tmp_path / "out"
    )
    assert outcome.status == 0, outcome.err
    settings = [json.loads((tmp_path / "out" / "round-1" / "summary.json").read_text())["rows"]]
    labels = {row["label"] for row in settings[0]}
    chosen = "cache=steps:computed=0x1,num_inference_steps=6"
    for method in ("dense", options[1]):
        assert {f"{method} {word}" for word in (chosen, *(f"cache={text}" for text in space.CACHES))} <= labels
    assert len(labels) == 8  # and the baseline, and the method
    picked = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert picked["tuned"]["row"] in labels


def test_caches_that_a_model_cannot_have_are_left_out_and_named(demo):
    from dit_accel.pipelines import demo as embedded

    pipe = embedded.load_demo(folder=demo)
    fitting, left_out = space.caches(pipe, 12)
    assert [str(cache) for cache in fitting] == [*space.CACHES, "steps:computed=0x1x2x5,num_inference_steps=12"]
    assert not left_out and len(space.caches(pipe, 3)[0]) == 2
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.1))
    fitting, left_out = space.caches(pipe, 12)
    assert not fitting and all("disable_cache()" in why for why in left_out.values()) and len(left_out) == 3


def test_dense_steps_are_shares_so_that_short_rounds_have_them_too():
    from dit_accel.registry import get_families

    options = TuneRequest(target="2x", method=("sol", "gna:window=3"), dense_steps=10, dense_layers=1)
    candidates, left_out = space.settings(options, dit_accel.TokenGrid(8, 32, 32), [get_families()["wan"]], 50)
    schedules = {candidate.setting.schedule for candidate in candidates}
    assert {(schedule.dense_steps, schedule.dense_layers) for schedule in schedules} == {(0.2, 1)} and not left_out
    assert [candidate.title for candidate in candidates if candidate.method == "gna"] == ["gna:window=3"]
    assert sum(candidate.method == "sol" for candidate in candidates) == len(space.DENSITIES) + 2  # ramp and preset
    (ramped,) = (candidate.setting for candidate in candidates if candidate.setting.ramped)
    assert ramped.config.first.tau > ramped.config.last.tau and ramped.config.names == ["tau"]


def test_a_preset_that_does_not_fit_is_left_out_and_named():
    from dit_accel.registry import get_families

    grid, family = dit_accel.TokenGrid(9, 96, 96), get_families()["hunyuan_video"]
    candidates, left_out = space.settings(TuneRequest(target="2x", method=("gna",)), grid, [family], 50)
    assert candidates and "stride <= window" in left_out["the preset of gna"]


def test_what_an_interrupt_says_before_anything_exists(tmp_path):
    from dit_accel.cli.eval import goes_on

    assert goes_on(tmp_path / "none") == "interrupted; nothing was written."
    assert str(tmp_path) in goes_on(tmp_path)


def test_the_bar_of_the_whole_tells_the_time_left_where_parts_take_minutes():
    """Parts that an earlier run has made do not count as fast ones."""
    from dit_accel.generation.sampling import TotalBar, progress_bar

    clock = [0.0]
    with progress_bar() as bar:
        bar.get_time = lambda: clock[0]
        whole = TotalBar(bar, "all of it", 10)
        whole.spare(2)
        for _ in range(4):
            clock[0] += 100
            whole.advance(1)
        assert bar.tasks[0].time_remaining == 400


def test_where_nothing_gains_no_file_is_written(cli, demo, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = ("--method", "gna:window=3", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out")
    outcome = cli("tune", *SMALL, "--target", "1000x", *options)
    assert outcome.status == 1, outcome.err
    assert not (tmp_path / "out" / "settings.json").exists() and "gna:window=3" in outcome.out
