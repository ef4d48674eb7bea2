"""`dit-accel train` from the command line: data, training, loading what it made; and what it refuses."""

import json
import os

import pytest
from messages import names, says

from dit_accel import files
from dit_accel.train.request import TrainRequest
from dit_accel.train.settings import TrainSettings

SIZE = ("--frames", "5", "--height", "32", "--width", "48")
METHOD = ("--method", "sla:topk=0.3", "--set", "block=16")
SEARCH = ("--search", "a.json", "--method", "sla", "--budget", ".5")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Every run has accelerate's process-wide state to itself."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_prepare_train_and_generate(cli, demo, tmp_path):
    data, folder = tmp_path / "prepared", tmp_path / "trained"
    prepared = cli("train", "--data", "clips", "--count", 3, *SIZE, *METHOD, "--prepare", "--output", data)
    assert prepared.status == 0, prepared.err
    assert len(json.loads((data / "data" / "dataset.json").read_text())["samples"]) == 3
    options = ("--steps", 2, "--batch", 2, "--rank", 2, "--option", "ema=0.5", "--option", "levels.shift=3")
    sampled = ("--prompt", "a red circle", "--validate-every", 2)
    done = cli("train", "--data", data / "data", *SIZE, *METHOD, *options, *sampled, "--output", folder)
    assert done.status == 0, done.err
    assert f"dit-accel generate --model demo --load {folder}" in done.out
    assert (folder / "validation" / "step-00000002" / "00.mp4").is_file()
    settings = json.loads((folder / "accelerator.json").read_text())
    assert settings["setting"]["method"] == "sla" and settings["trained"]["model"] == "demo"
    shown = cli("generate", *SIZE, "--steps", 1, "--load", folder, "--output", tmp_path / "a.mp4")
    assert shown.status == 0 and "sla(topk=0.3" in shown.out
    card = (folder / "README.md").read_text()
    (tmp_path / "prompts.txt").write_text("a blue square\n")
    options = ("--prompts", tmp_path / "prompts.txt", *SIZE, "--steps", 1, "--metric", "psnr", "--pictures", 0)
    for turn in ("first", "second"):  # the second replaces the first
        done = cli("eval", *options, "--load", folder, "--write-card", "--output", tmp_path / turn)
        assert done.status == 0, done.err
    measured = (folder / "README.md").read_text()
    assert measured.count("`baseline`") == measured.count("from trained`") == 1 and "5 frames of 32x48" in measured
    assert "Not measured" not in measured
    before, after = card.split("Not measured yet", 1)
    assert measured.startswith(before) and measured.endswith(after[after.index("\n\n## Limits") :])


def test_data_of_other_options_is_refused(cli, demo, tmp_path):
    """The same command goes on, also where the data is not whole."""
    folder = tmp_path / "trained"

    def train(*options):
        return cli("train", *METHOD, "--steps", 1, "--rank", 2, *options, "--output", folder)

    clips = ("--data", "clips", "--count", 2, *SIZE)
    assert train(*clips, "--prepare").status == 0
    (folder / "data" / "dataset.json").unlink()
    for _ in range(2):
        outcome = train(*clips)
        assert outcome.status == 0, outcome.err
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for changed, message in (
        (("--count", 1), "--count 2 1"),
        (("--frames", 9), "--frames 5 9"),
        (("--width", 32), "--width 48 32"),
        (("--data", "generated", "--prompts", tmp_path / "prompts.txt"), "--data clips generated"),
    ):
        outcome = train(*clips, *changed)
        assert (outcome.status, says(outcome.err, message, folder / "data", "--output")) == (2, True), outcome
    outcome = train("--data", "clips", *SIZE)
    assert (outcome.status, says(outcome.err, "--count 2"), says(outcome.err, "None")) == (2, True, False), outcome
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("task", [(), ("--prepare",), (*SEARCH, "--candidate", "topk=0.5,block=16")])
def test_a_folder_in_use_is_refused(cli, demo, tmp_path, task):
    (tmp_path / "trained").mkdir()
    with files.hold(tmp_path / "trained"):
        before = sorted(tmp_path.rglob("*"))
        options = (
            "--data",
            "clips",
            "--count",
            1,
            *SIZE,
            *(task if "--search" in task else (*METHOD, *task)),
            "--output",
            tmp_path / "trained",
        )
        outcome = cli("train", *options)
        assert outcome.status == 2 and says(outcome.err, "--output", tmp_path / "trained", os.getpid())
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("option", "value"), [("--rank", 10**7), ("--batch", 10**9)])
def test_what_memory_cannot_hold_is_refused_at_once(cli, demo, tmp_path, option, value):
    options = ("--data", "clips", "--count", 1, *SIZE, *METHOD, "--output", tmp_path / "trained")
    outcome = cli("train", *options, option, value)
    assert outcome.status == 2 and says(outcome.err, option, value, "GB")
    assert list(tmp_path.iterdir()) == []
    outcome = cli("train", *options, "--rank", 10**5)
    assert outcome.status == 2 and says(outcome.err, "--rank", 10**5)
    assert list(tmp_path.iterdir()) == []


def test_two_trainings_from_python_cannot_share_a_folder(demo, tmp_path):
    from dit_accel.train.loop import train

    folder = tmp_path / "trained"
    with files.hold(folder), pytest.raises(files.InUse, match=names(folder, os.getpid())):
        train(None, TrainSettings(method="sla"), tmp_path, folder, base=None)


def test_a_distilled_model_is_sampled_in_its_steps(cli, demo, tmp_path):
    options = ("--method", "dense", "--objective", "consistency", "--option", "distillation.segments=2")
    options += ("--option", "distillation.teacher_steps=4", "--steps", 1, "--rank", 2)
    trained = cli("train", "--data", "clips", "--count", 2, *SIZE, *options, "--output", tmp_path / "few")
    assert trained.status == 0, trained.err
    shown = cli("generate", *SIZE, "--load", tmp_path / "few", "--output", tmp_path / "a.mp4")
    assert shown.status == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["call"]["num_inference_steps"], record["call"]["guidance_scale"]) == (2, 1.0)
    (tmp_path / "prompts.txt").write_text("a blue square\n")
    options = ("--prompts", tmp_path / "prompts.txt", *SIZE, "--metric", "psnr", "--load", tmp_path / "few")
    for folder, steps, ran in (("own", (), [12, 2]), ("asked", ("--steps", 3), [3, 3])):
        done = cli("eval", *options, *steps, "--output", tmp_path / folder)
        assert done.status == 0, done.err
        rows = json.loads((tmp_path / folder / "summary.json").read_text())["rows"]
        assert [row["steps"] for row in rows] == ran
        assert [row["guidance"] for row in rows] == [1.0, 1.0]
        assert (
            "in 2 steps with guidance 1.0, baseline in 12 with 1.0." in (tmp_path / folder / "summary.md").read_text()
        ) == (folder == "own")


def test_generated_data_and_a_layer_search(cli, demo, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    schedule = tmp_path / "schedule.json"
    candidates = ("--candidate", "window=3", "--candidate", "window=1", "--budget", 0.4)
    data = ("--data", "generated", "--prompts", tmp_path / "prompts.txt", *SIZE)
    done = cli("train", *data, "--search", schedule, "--method", "gna", *candidates, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    content = json.loads(schedule.read_text())
    assert content["search"]["density"] <= 0.4 and len(content["layers"]["transformer"]) == 2
    assert len(json.loads((tmp_path / "run" / "data" / "dataset.json").read_text())["samples"]) == 2


@pytest.fixture
def refused(cli, tmp_path):
    def run(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = cli("train", *arguments, "--output", tmp_path / "out")
        assert outcome.status == 2 and outcome.out == "", outcome
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("dit-accel: error: ")]
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return line.removeprefix("dit-accel: error: ")

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*METHOD, "--data", "clips", "--candidate", "topk=0.5"), "--search --candidate"),
        ((*METHOD, "--data", "clips", "--budget", "0.5"), "--search --budget"),
        (("--recipe", "sla-dem"), "sla-dem sla-demo"),
        (("--method", "slaa"), "slaa sla"),
        ((*METHOD,), "--prompts"),
        ((*METHOD, "--prompts", "generl"), "generl general"),
        ((*METHOD, "--data", "clips", "--prompts", "demo"), "--data clips --prompts demo"),
        (("--recipe", "sla-demo", "--prompts", "demo"), "--data clips --prompts demo"),
        ((*METHOD, "--data", "nowhere"), "nowhere 'generated' 'clips'"),
        ((*METHOD, "--data", "clips", "--frames", "4"), "4 3 5"),
        ((*METHOD, "--data", "clips", "--height", "33"), "33 32 48"),
        ((*METHOD, "--data", "clips", "--objective", "flow=x"), "NAME=WEIGHT"),
        ((*METHOD, "--data", "clips", "--objective", "flo"), "flo flow"),
        ((*METHOD, "--data", "clips", "--option", "emma=1"), "emma ema"),
        ((*METHOD, "--data", "clips", "--option", "ema"), "KEY=VALUE"),
        ((*METHOD, "--data", "clips", "--option", "levels=3", "--option", "levels.std=1"), "levels levels.std"),
        ((*METHOD, "--data", "clips", "--rate", "-1"), "rate 0 -1.0"),
        ((*METHOD, "--data", "clips", "--seed", "99999999999999999999"), "--seed"),
        ((*METHOD, "--data", "clips", "--seed", str(2**23)), "--seed"),
        ((*METHOD, "--data", "clips", "--steps", "99999999999999999999"), "--steps"),
        ((*METHOD, "--data", "clips", "--model", "./none"), "./none"),
        ((*METHOD, "--data", "clips", "--prompt", "a red circle"), "--prompt --validate-every 0"),
        ((*METHOD, "--data", "clips", "--validate-every", "2"), "--validate-every 2 --prompt"),
        ((*METHOD, "--data", "clips", "--option", "validate_every=2"), "--validate-every 2 --prompt"),
        (("--data", "clips", "--method", "dense"), "dense"),
        (("--recipe", "radial-wan2.1-14b-2x"), "--data"),
        (("--data", "clips", "--search", "a.json", "--method", "gna", "--candidate", "window=3"), "--threshold none"),
        (
            ("--data", "clips", *SIZE, *SEARCH, "--threshold", "2", "--candidate", "topk=1"),
            "--threshold 2.0 --budget 0.5",
        ),
        (
            ("--data", "clips", *SIZE, "--search", "a.json", "--method", "sla", "--budget", ".5"),
            "--candidate",
        ),
        (("--data", "clips", *SIZE, *SEARCH, "--candidate", "topk=1", "--candidate", "tpk=1"), "tpk"),
        (
            ("--data", "clips", *SIZE, *SEARCH, "--candidate", "topk=1", "--candidate", "topk=2"),
            "topk 1 2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused(refused, demo, options, message):
    assert says(refused(*options), message)


def test_a_recipe_with_a_mistake_in_its_data(refused, demo, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{about: a, source: b, model: demo, data: {sorce: clips}, train: {method: sla}}")
    assert says(refused("--recipe", recipe), "data sorce source")


def test_a_recipe_may_say_how_often_prompts_are_sampled(demo, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "{about: a, source: b, model: demo, data: {source: clips}, train: {method: sla, validate_every: 3}}"
    )
    for samples in ((), ("a red circle",)):
        request = TrainRequest.of({"recipe": str(recipe), "samples": samples}, {}, {})
        assert (request.run.samples, request.train.validate_every) == (samples, 3)


def test_empty_folders_and_prompts(refused, demo, tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "none.txt").write_text("\n")
    assert says(refused(*METHOD, "--prompts", tmp_path / "none.txt"), tmp_path / "none.txt", "prompt")
    assert says(refused(*METHOD, "--data", tmp_path / "media", *SIZE), tmp_path / "media", "image video")
