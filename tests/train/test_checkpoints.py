"""Checkpoints on a full disk, and damaged ones."""

import contextlib
import resource
import shutil

import pytest
from messages import names

import dit_accel
from dit_accel.train import state


@pytest.fixture
def small_files():
    """Inside, no file grows beyond 1,000 bytes: what a full disk is to whoever writes one."""

    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def test_a_full_disk_keeps_the_last_checkpoint(trained, tmp_path, monkeypatch, small_files):
    trained("full", steps=2)
    import safetensors.torch

    write = safetensors.torch.save_file

    def full(*arguments, **keywords):
        with small_files():
            write(*arguments, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(dit_accel.DitAccelError, match=names(4, "File too large", "step-00000002")) as error:
        trained("full", steps=4)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert len(state.read_losses(trained("full", steps=4) / "losses.jsonl")) == 4


def test_a_full_disk_leaves_the_saved_weights_as_they_were(trained, tiny, small_files):
    folder, pipe = trained(rank=0, steps=1), tiny.load()
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with dit_accel.load(pipe, folder) as accel:
        with (
            pytest.raises(dit_accel.DitAccelError, match=names("File too large")),
            small_files(),
        ):
            accel.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_damaged_checkpoints_are_named(trained, tmp_path):
    folder = trained(steps=2)
    (folder / "checkpoints" / "step-00000002" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(dit_accel.DitAccelError, match="step-00000002 is damaged"):
        trained(steps=3)
    shutil.rmtree(folder / "checkpoints")
    trained(steps=3)


@pytest.mark.parametrize(
    "content", ["{bad", "[]", '{"step": "2", "record": {}}', '{"step": 2, "record": 3}', '{"step": 2, "record": {}}']
)
def test_a_damaged_state_is_named(trained, content):
    folder = trained(steps=2)
    (folder / "checkpoints" / "step-00000002" / "state.json").write_text(content)
    with pytest.raises(dit_accel.DitAccelError, match=r"step-00000002.state\.json"):
        trained(steps=3)


@pytest.mark.parametrize("line", ["{bad", "3", '{"step": "1", "loss": 1}', '{"loss": 1}', "[" * 100_000])
def test_a_damaged_loss_curve_is_named_and_stays(trained, line):
    folder = trained(steps=2)
    content = (folder / "losses.jsonl").read_text() + line + "\n"
    (folder / "losses.jsonl").write_text(content)
    with pytest.raises(dit_accel.DitAccelError, match=r"losses\.jsonl"):
        trained(steps=3)
    assert (folder / "losses.jsonl").read_text() == content
