"""A run from data to artefact: it learns, survives kills, stops where it must, and what it leaves can be loaded."""

import os
import signal
import socket
import subprocess
import sys

import kills
import pytest
import torch
from launching import TWO_PROCESSES
from messages import names

import dit_accel
from dit_accel.checkpoint import lora as adapters
from dit_accel.plans.gate import divergence, gate_sample
from dit_accel.train import state
from dit_accel.train.card import Base
from dit_accel.train.data import Dataset
from dit_accel.train.loop import train
from dit_accel.train.networks import TrainingNetworks
from dit_accel.train.settings import make


def curve(folder):
    return [{k: v for k, v in row.items() if k != "rate"} for row in state.read_losses(folder / "losses.jsonl")]


def call_of(data):
    sample = Dataset(data)[0]
    return {"hidden_states": sample.latents, "timestep": torch.tensor([700.0]), **sample.call}


@torch.no_grad()
def run(pipe, data):
    return pipe.transformer(**call_of(data), return_dict=False)[0]


def test_it_learns_and_the_artefact_brings_it_back(trained, tiny):
    """SLA and its LoRA come nearer to the dense model than SLA alone, from a fresh pipeline, and leave no trace."""
    setting = {"method": "sla", "config": {"topk": 0.2, "block": 8}}
    plain = {"steps": 30, "rate": 1e-3, "ema": 0.5, "warmup": 2, "decay": "cosine", "save_every": 30}
    folder = trained(call={"num_inference_steps": 3}, **plain, **setting)
    rows = state.read_losses(folder / "losses.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 31))
    files = {path.name for path in folder.iterdir()}
    assert files == {
        *("README.md", "accelerator.json", "accelerator.safetensors", "pytorch_lora_weights.safetensors"),
        *("losses.jsonl", "checkpoints"),
    }
    pipe = tiny.load()
    names, dense = list(pipe.transformer.state_dict()), run(pipe, tiny.data)
    with dit_accel.accelerated(pipe, "sla", **setting["config"]):
        untuned = run(pipe, tiny.data)
    accel = dit_accel.load(pipe, folder)
    tuned = run(pipe, tiny.data)
    assert (tuned - dense).square().mean() < (untuned - dense).square().mean()
    assert accel.trained.lora and accel.trained.call == {"num_inference_steps": 3}
    assert all(module.proj.weight.abs().max() > 0 for module in accel.learned_weights().values())

    accel.save_pretrained(folder.parent / "again")
    accel.remove()
    assert list(pipe.transformer.state_dict()) == names and torch.equal(run(pipe, tiny.data), dense)
    with dit_accel.load(pipe, folder.parent / "again"):
        assert torch.equal(run(pipe, tiny.data), tuned)
    # Diffusers' own way: the same LoRA under the same method.
    pipe.load_lora_weights(str(folder), adapter_name="own")
    assert pipe.transformer.peft_config["own"].lora_alpha == 4
    card = (folder / "README.md").read_text()
    assert "base_model: tiny" in card and "license: apache-2.0" in card and "{" not in card.split("---")[1]


def test_gates_learn_and_the_model_stays(trained, tiny):
    """The objective gate alone: sparge's gates move, are saved and come back; nothing else changes."""
    config = {"topk": 0.3, "topp": 0.0, "score": "learned", "block_q": 8, "block": 8}
    folder = trained(method="sparge", config=config, objectives={"gate": 1.0}, checkpointing=True, rate=1e-3)
    assert not (folder / adapters.LORA_FILE).exists()
    assert "sparge's own weights in 2 layers; 4 steps" in (folder / "README.md").read_text()
    pipe = tiny.load()
    names, dense = pipe.transformer.state_dict().keys(), run(pipe, tiny.data)
    losses = []

    def note(call):
        losses.append(divergence(gate_sample(call)))

    with dit_accel.accelerated(pipe, "sparge", **config) as accel, accel.watch(note):
        untuned = run(pipe, tiny.data)
    with dit_accel.load(pipe, folder) as accel, accel.watch(note):
        moved = [weight for gate in accel.learned_weights().values() for weight in gate.parameters()]
        assert all(not torch.equal(weight, torch.eye(*weight.shape[1:]).expand_as(weight)) for weight in moved)
        assert not accel.trained.lora and not accel.trained.full and not torch.equal(run(pipe, tiny.data), untuned)
    assert sum(losses[2:]) < sum(losses[:2])
    assert pipe.transformer.state_dict().keys() == names and torch.equal(run(pipe, tiny.data), dense)


def test_other_models_are_refused(trained, tiny):
    folder = trained(steps=1)
    pipe = tiny.load()
    with torch.no_grad():
        pipe.transformer.blocks[1].ffn.net[2].weight.mul_(1.1)
    with pytest.raises(dit_accel.DitAccelError, match=names("tiny")):
        dit_accel.load(pipe, folder)
    assert not hasattr(pipe.transformer, "peft_config")
    dit_accel.load(pipe, folder, any_weights=True).remove()
    (folder / adapters.LORA_FILE).write_bytes(b"")
    with pytest.raises(dit_accel.DitAccelError, match="damaged or does not belong"):
        dit_accel.load(tiny.load(), folder)


def test_an_adapter_of_the_users_keeps_its_scale(trained, tiny):
    folder, pipe = trained(steps=1), tiny.load()
    pipe.load_lora_weights(str(folder), adapter_name="own")
    pipe.set_adapters("own", 0.5)
    layer = pipe.transformer.blocks[0].attn1.to_q
    scaling = dict(layer.scaling)
    with dit_accel.load(pipe, folder):
        assert layer.active_adapters == ["own", adapters.ADAPTER] and layer.scaling["own"] == scaling["own"]
    assert layer.active_adapters == ["own"] and layer.scaling == scaling


def test_the_fingerprint_is_the_same_in_bfloat16(tiny):
    pipe = tiny.load()
    mark = adapters.fingerprint(pipe.transformer)
    assert adapters.fingerprint(pipe.transformer.to(torch.bfloat16)) == mark
    with pytest.raises(dit_accel.DitAccelError, match="cannot be compared"):
        adapters.fingerprint(pipe.transformer.to(torch.float8_e4m3fn))


def test_full_weights(trained, tiny):
    folder = trained(rank=0, rate=1e-3)
    assert (folder / "transformer" / "config.json").is_file() and not (folder / adapters.LORA_FILE).exists()
    pipe = tiny.load()
    dense = run(pipe, tiny.data)
    with dit_accel.accelerated(pipe, "gna", window=3):
        untuned = run(pipe, tiny.data)
    with dit_accel.load(pipe, folder) as accel:
        assert accel.trained.full and not torch.equal(run(pipe, tiny.data), untuned)
    assert torch.equal(run(pipe, tiny.data), dense)


@pytest.mark.parametrize(
    "settings",
    [
        {"objectives": {"flow": 1.0, "attention": 0.5, "final": 0.5}, "attention_every": 2, "checkpointing": True},
        {"method": "dense", "config": {}, "objectives": {"consistency": 1.0}, "distillation": {"segments": 2}},
        {"precision": "bf16", "targets": ["to_q", "net.2"], "accumulation": 2},
    ],
    ids=["objectives", "consistency", "bf16"],
)  # fmt: skip
def test_kinds_of_runs(settings, trained):
    rows = state.read_losses(trained(steps=2, **settings) / "losses.jsonl")
    assert len(rows) == 2 and all(0 < row["loss"] < 100 for row in rows)
    assert set(rows[0]) == {"step", "loss", "rate", *settings.get("objectives", {"teacher": 1})}


def test_training_leaves_no_hook(tiny, tmp_path):
    """A hook would keep the teacher, which is a whole copy of the model where all weights train."""
    pipe = tiny.load()
    settings = {"method": "gna", "config": {"window": 3}, "rank": 0, "steps": 1}
    train(
        pipe, make(settings | {"objectives": {"attention": 1.0, "final": 1.0}}), tiny.data, tmp_path, base=Base("tiny")
    )
    modules = dict(pipe.transformer.named_modules()).items()
    assert [name for name, module in modules if module._forward_hooks or module._forward_pre_hooks] == [""]


def test_some_batches_have_the_empty_prompt(trained, tiny, monkeypatch):
    empty, seen, outputs = Dataset(tiny.data).negative["encoder_hidden_states"], [], TrainingNetworks.outputs

    def look(self, model, noisy, timestep, call):
        text = call["encoder_hidden_states"]
        if torch.is_grad_enabled():  # the student's call, not the teacher's
            seen.append(torch.equal(text, empty.expand_as(text)))
        return outputs(self, model, noisy, timestep, call)

    monkeypatch.setattr(TrainingNetworks, "outputs", look)
    trained(steps=8, empty_prompts=0.5)
    assert len(seen) == 8 and {*seen} == {True, False}


def test_samples_on_the_way(trained):
    from dit_accel.train.state import Validation

    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0, "num_frames": 5, "height": 32, "width": 48}
    folder = trained(steps=2, validate_every=1, ema=0.9, validation=Validation(("a", "b"), arguments))
    paths = sorted(path.relative_to(folder / "validation").as_posix() for path in folder.glob("validation/*/*"))
    assert paths == [f"step-0000000{step}/0{i}.mp4" for step in (1, 2) for i in (0, 1)]


SLA = {"method": "sla", "config": {"topk": 0.2, "block": 8}, "ema": 0.9}


def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, elsewhere, tmp_path):
    """SIGKILL when a checkpoint is written and not yet named; the losses are those of one run, bit for bit."""
    folder = tmp_path / "killed"
    process = elsewhere({"killed": SLA | {"steps": 9, "save_every": 3}}, dies="step-00000006")
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors[-3000:]
    assert [path.name for path in state.checkpoints_in(folder / "checkpoints")] == ["step-00000003"]
    before = curve(folder)
    assert len(before) == 6
    whole = trained("whole", steps=9, save_every=3, **SLA)
    resumed = trained("killed", steps=9, save_every=3, **SLA)
    assert curve(resumed) == curve(whole) and before == curve(whole)[:6]
    assert_same_ends(whole, resumed)


def test_a_run_in_fp16_goes_on_with_its_loss_scale(tiny, tmp_path, monkeypatch):
    """A scale that doubles every step, on a scaler of the CPU, since accelerate has one on GPUs alone."""
    from dit_accel.train import loop

    scalers, join = [], loop.join

    def with_scaler(*arguments):
        hf = join(*arguments)
        hf.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        scalers.append(hf.scaler)
        return hf

    monkeypatch.setattr(loop, "join", with_scaler)
    settings = {"method": "gna", "config": {"window": 3}, "rank": 2}
    for steps in (2, 3):
        train(tiny.load(), make(settings | {"steps": steps}), tiny.data, tmp_path, base=Base("tiny"))
    assert [scaler.get_scale() for scaler in scalers] == [16.0, 32.0]


@pytest.fixture
def rounding_budget(trained):
    """How far float32 rounding may move the losses of a run, relative to them.

    Twice what moving each weight at the start to a neighbouring float32 does to a loss, at the worst of four random
    moves, and one rounding: the rule of `tests/accuracy.py`, where steps of Adam stand between input and result.
    """

    def budget(**settings):
        runs = [curve(trained(f"moved-{seed}", moved=seed, **settings)) for seed in (None, 0, 1, 2, 3)]
        still, *moved = torch.tensor([[row["loss"] for row in rows] for rows in runs], dtype=torch.float64)
        largest = max(((losses - still).abs() / still).max().item() for losses in moved)
        return 2 * largest + torch.finfo(torch.float32).eps

    return budget


def test_a_run_goes_on_in_another_number_of_processes(trained, elsewhere, tmp_path):
    """LoRA, SLA's weights and their averages: begun in one process, sharded over two by FSDP 2, ended in two.

    The same bits as in one process: sums of two gradients have one order, and halves are exact.
    """
    whole = trained("whole", steps=4, accumulation=2, **SLA)
    moving = trained("moving", steps=1, accumulation=2, **SLA)
    for steps, shards in ((3, True), (4, False)):
        process = elsewhere({"moving": SLA | {"steps": steps}}, TWO_PROCESSES, shards=shards)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]
    assert curve(moving) == curve(whole) and len(curve(whole)) == 4
    assert_same_ends(moving, whole)
    with pytest.raises(dit_accel.DitAccelError, match="accumulation"):
        trained("moving", steps=5, **SLA)


def test_a_killed_process_ends_the_others(tiny, tmp_path, root):
    """The first one is killed at its checkpoint, for which the second waits."""
    train = ["train", "--model", tiny.model, "--data", tiny.data, "--method", "gna:window=3", "--steps", 4, "--rank", 2]
    train += ["--frames", 5, "--height", 32, "--width", 48, "--save-every", 2, "--output", tmp_path / "run"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"PYTHONPATH": os.pathsep.join((str(root), kills.TESTS)), "OMP_NUM_THREADS": "1"}
    commands = kills.cli(tmp_path, "step-00000002", 1, train), [sys.executable, "-m", "dit_accel", *map(str, train)]
    first, second = (
        subprocess.Popen(
            command,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    )
    _, errors = first.communicate(timeout=400)
    assert first.returncode == -signal.SIGKILL, errors[-3000:]
    _, errors = second.communicate(timeout=60)
    messages = [line for line in errors.splitlines() if line.startswith("dit-accel: ")]
    assert second.returncode == 2 and len(messages) == 1 and "Traceback" not in errors, errors[-3000:]


def test_fsdp_that_accelerate_would_leave_out_is_refused(trained, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(dit_accel.DitAccelError, match="FSDP"):
        trained()


def assert_same_ends(*folders):
    ends = [state.load(state.checkpoints_in(folder / "checkpoints")[-1])[1] for folder in folders]
    for part in state.PARTS:
        assert ends[0][part].keys() == ends[1][part].keys() and ends[0][part]
        assert all(torch.equal(ends[0][part][name], ends[1][part][name]) for name in ends[0][part])


def test_portable_and_triton_train_alike(elsewhere, tmp_path, rounding_budget):
    """The same LoRA, three steps, by both implementations; Triton under its interpreter, in a process of its own."""
    kinds = {impl: {"impl": impl, "steps": 3, "batch": 1} for impl in ("portable", "triton")}
    process = elsewhere(kinds, TRITON_INTERPRET="1")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    portable, triton = (curve(tmp_path / impl) for impl in kinds)
    bound = rounding_budget(**kinds["portable"])
    assert [row["loss"] for row in triton] == pytest.approx([row["loss"] for row in portable], rel=bound)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_fine_tuning_that_was_taken_back_is_not_saved(rank, trained, tiny, tmp_path):
    accel = dit_accel.load(tiny.load(), trained(rank=rank, steps=1))
    accel.remove()
    with pytest.raises(dit_accel.DitAccelError, match=r"before remove\(\)"):
        accel.save_pretrained(tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_a_tracker_that_is_not_there_is_refused(trained, monkeypatch):
    """Accelerate itself goes on without one that is known but not installed."""
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    for tracker in ("wandb", "wandbb"):
        with pytest.raises(dit_accel.DitAccelError, match=names(f"'{tracker}'")):
            trained(steps=1, tracker=tracker)


def test_another_run_in_the_same_folder_is_refused(trained):
    trained(steps=2)
    with pytest.raises(dit_accel.DitAccelError, match=names("rate", 0.01, 0.02)):
        trained(steps=2, rate=2e-2)
    trained(steps=3)


def test_a_loss_that_is_not_a_number_stops_the_run(trained, tmp_path, monkeypatch):
    from dit_accel.train.objectives import OBJECTIVES

    def after_three(student, teacher, target, calls=[]):  # noqa: B006
        calls.append(0)
        return (student.prediction * (float("nan") if len(calls) > 3 else 1)).square().mean()

    monkeypatch.setitem(OBJECTIVES, "teacher", after_three)
    with pytest.raises(dit_accel.DitAccelError, match=names("nan", 4, "step-00000002")):
        trained("nan", steps=9)
    assert all(
        torch.isfinite(weight).all()
        for weight in state.load(state.checkpoints_in(tmp_path / "nan" / "checkpoints")[-1])[1]["weights"].values()
    )


def test_push_to_hub(trained, tiny, monkeypatch):
    """The folder goes where Diffusers' own `push_to_hub` would put it."""
    import huggingface_hub

    seen = []

    class Api:
        def __init__(self, token=None):
            seen.append(token)

        def create_repo(self, repo_id, private=None, exist_ok=False):
            seen.append((repo_id, private, exist_ok))
            return huggingface_hub.RepoUrl("https://huggingface.co/me/mine")

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen.append((repo_id, sorted(os.listdir(folder_path))))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = trained(steps=1)
    with dit_accel.load(tiny.load(), folder) as accel:
        accel.save_pretrained(folder.parent / "up", push_to_hub=True, repo_id="mine", token="secret")
    assert seen[:2] == ["secret", ("mine", None, True)]
    assert seen[2] == ("me/mine", ["accelerator.json", "pytorch_lora_weights.safetensors"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_its_step_and_keeps_it(trained, tmp_path, monkeypatch, number):
    """The signal comes in the middle of step 2; the run then goes on as one that was never stopped."""
    from dit_accel.train.loop import Trainer

    losses_of, calls = Trainer._losses, []

    def stop(self, *arguments):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return losses_of(self, *arguments)

    monkeypatch.setattr(Trainer, "_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", steps=4, **SLA)
    monkeypatch.undo()
    assert [path.name for path in state.checkpoints_in(tmp_path / "stopped" / "checkpoints")] == ["step-00000002"]
    assert curve(trained("stopped", steps=4, **SLA)) == curve(trained("whole", steps=4, **SLA))
