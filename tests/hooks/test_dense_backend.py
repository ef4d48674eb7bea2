"""Dense steps and layers on a back end of Diffusers' dispatcher."""

import json

import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from messages import names
from tiny_models import run

import dit_accel
from dit_accel.cli.app import main
from dit_accel.hooks import dense_backend

WINDOW = {"window": (3, 5, 4)}


@pytest.fixture
def math_calls(monkeypatch):
    """Calls of the back end `_native_math`."""
    calls, native = [], _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends,
        AttentionBackendName._NATIVE_MATH,
        lambda **arguments: calls.append(arguments["query"].shape[1]) or native(**arguments),
    )
    return calls


def backends(transformer):
    return {name: processor._attention_backend for name, processor in transformer.attn_processors.items()}


def test_dense_layers_run_on_the_named_back_end(math_calls):
    """Sparse layers do not, and neither does cross-attention, whose processors are not ours."""
    tiny = tiny_models.get("wan", "t2v")
    transformer = tiny.build()
    with dit_accel.accelerated(
        transformer, "gna", dense_layers=1, dense_backend="_native_math", window="full"
    ) as accel:
        torch.testing.assert_close(run(transformer, tiny.call()), tiny.dense, rtol=1e-4, atol=1e-4)
        assert math_calls == [tiny.grid.tokens]
        assert "dense attention runs on _native_math: asked for" in accel.report().notes
        assert [layer.dense_calls for layer in accel.report().layers] == [1, 0]
    assert set(backends(transformer).values()) == {None}
    assert torch.equal(run(transformer, tiny.call()), tiny.dense)


def test_auto_is_the_models_own_on_a_cpu():
    tiny = tiny_models.get("wan", "t2v")
    with dit_accel.accelerated(tiny.shared, "dense", dense_backend="auto") as accel:
        assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)
    assert accel.report().notes[0].startswith("dense attention runs on the model's own: ")


@pytest.mark.parametrize(
    ("capability", "chosen"), [((8, 0), None), ((9, 0), "_native_cudnn"), ((12, 0), "_native_cudnn")]
)
def test_auto_on_cuda_goes_by_the_architecture(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    name, why = dense_backend.choose("auto", torch.device("cuda", 0))
    assert name == chosen and why


def test_auto_goes_by_where_an_offloaded_pipeline_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    transformer, scheduler = tiny_models.get("wan", "t2v").build(), FlowMatchEulerDiscreteScheduler()
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"))
    with dit_accel.accelerated(pipe, "dense", dense_backend="auto"):
        assert AttentionBackendName._NATIVE_CUDNN in backends(pipe.transformer).values()


def test_a_back_end_that_is_set_already_stays():
    tiny = tiny_models.get("wan", "t2v")
    transformer = tiny.build()
    transformer.set_attention_backend("native")
    with dit_accel.accelerated(transformer, "dense", dense_backend="_native_math") as accel:
        assert set(backends(transformer).values()) == {AttentionBackendName.NATIVE}
        assert "2 have a back end set already" in accel.report().notes[0]


def test_processors_without_the_dispatcher_are_counted():
    tiny = tiny_models.get("cogvideox", "1.0")
    with dit_accel.accelerated(tiny.shared, "dense", dense_backend="_native_math") as accel:
        assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)
        assert "2 of 2 processors do not use Diffusers' dispatcher" in accel.report().notes[0]


def test_replacing_an_accelerator_keeps_the_back_end():
    tiny = tiny_models.get("wan", "t2v")
    transformer = tiny.build()
    dit_accel.accelerate(transformer, "dense", dense_backend="_native_math")
    accel = dit_accel.accelerate(transformer, "dense", dense_backend="_native_math", replace=True)
    assert "_native_math" in backends(transformer).values()
    accel.remove()
    assert set(backends(transformer).values()) == {None}


def test_on_the_command_line(tmp_path, capfd, math_calls):
    """Of generate and of eval; an unknown name is refused before anything is loaded."""
    size = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "2"]
    output, backend = tmp_path / "clip.mp4", ["--dense-backend", "_native_math"]
    for command in (
        ["generate", *size, "--method", "gna:window=full", "--dense-steps", "1", *backend, "--output", str(output)],
        ["generate", *size, "--method", "gna:window=full", "--dense-backend", "fast", "--output", str(output)],
        ["eval", *size, *backend],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == (0 if command[-1] == str(output) and "fast" not in command else 2)
    assert math_calls
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["setting"]["dense_backend"] == "_native_math"
    assert "dense attention runs on _native_math: asked for" in record["report"]["notes"]
    errors = capfd.readouterr().err
    assert "got 'fast'" in errors and "--dense-backend" in errors


@pytest.mark.parametrize(("name", "message"), [("fast", "flash"), ("flash", "dense_backend")])
def test_what_cannot_run_is_refused_before_anything_changes(name, message, monkeypatch):
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    transformer = tiny_models.get("wan", "t2v").build()
    before = dict(transformer.attn_processors)
    with pytest.raises(dit_accel.DitAccelError, match=names(message)):
        dit_accel.accelerate(transformer, "gna", dense_backend=name, **WINDOW)
    assert dict(transformer.attn_processors) == before
