"""`dense_backend="auto8"`: back ends are taken after a verified call, with stand-ins in Diffusers' dispatcher."""

import types

import pytest
import tiny_models
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_models import run

import dit_accel
from dit_accel.errors import DitAccelWarning
from dit_accel.hooks import several, verified_backend
from dit_accel.hooks.verified_backend import LIMIT, Verified, relative_error

FP8, SAGE, FP16, FLASH = "_sage_qk_int8_pv_fp8_cuda", "sage", "_sage_qk_int8_pv_fp16_cuda", "_flash_3"


def raises(**arguments):
    raise RuntimeError("no kernel image")


def wrong(**arguments):
    """Half of the keys."""
    half = arguments["key"].shape[1] // 2
    return native(**arguments | {"key": arguments["key"][:, :half], "value": arguments["value"][:, :half]})


def good(**arguments):
    return native(**arguments) * (1 + LIMIT / 10)


def native(**arguments):
    return _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE](**arguments)


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins into the dispatcher, and returns the names of those that run, call by call."""

    def put(stand_ins):
        calls = []

        def recorded(name, function):
            return lambda **arguments: calls.append(name) or function(**arguments)

        monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", bool(stand_ins))
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", FLASH in stand_ins)
        monkeypatch.setattr(verified_backend, "CANDIDATES", (FP8, SAGE, FP16, FLASH))
        for name, function in stand_ins.items():
            backend = AttentionBackendName(name)
            monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, recorded(name, function))
        return calls

    return put


@pytest.fixture
def model():
    tiny = tiny_models.get("wan", "t2v")
    return tiny, tiny.build()


def note(accel, *words):
    return [text for text in accel.report().notes if all(word in text for word in words)]


def test_the_first_that_passes_runs_and_the_others_have_reasons(install, model):
    tiny, transformer = model
    calls = install({FP8: raises, SAGE: wrong, FP16: good})
    with dit_accel.accelerated(transformer, "gna", dense_steps=1, dense_backend="auto8", window=(3, 5, 4)) as accel:
        accel.set_step(0, 2)
        assert torch.equal(run(transformer, tiny.call()), tiny.dense)  # the exact back end's result
        assert calls == [FP8, SAGE, FP16, FP16]  # the second layer verifies what passed in the first
        second = run(transformer, tiny.call())
        assert calls[4:] == [FP16, FP16] and not torch.equal(second, tiny.dense)
        with accel.paused():
            assert torch.equal(run(transformer, tiny.call()), tiny.dense)
        assert torch.equal(run(transformer, tiny.call()), second)
        accel.set_step(1, 2)
        run(transformer, tiny.call())
        assert len(calls) == 8
        assert note(accel, FP16, "2 layers") and note(accel, FP8, "no kernel image")
        assert note(accel, SAGE, "relative error") and note(accel, FLASH, "not installed")
    assert {processor._attention_backend for processor in transformer.attn_processors.values()} == {None}


@pytest.mark.parametrize("stand_ins", [{}, {FP8: raises, SAGE: wrong, FP16: wrong}], ids=["none", "none passes"])
def test_without_one_the_normal_back_end_runs_and_it_is_said(install, model, stand_ins):
    tiny, transformer = model
    calls = install(stand_ins)
    with pytest.warns(DitAccelWarning, match="auto8"):
        accel = dit_accel.accelerate(transformer, "dense", dense_backend="auto8")
        assert torch.equal(run(transformer, tiny.call()), tiny.dense)
    assert torch.equal(run(transformer, tiny.call()), tiny.dense)
    assert len(calls) == len(stand_ins)
    assert note(accel, "the model's own back end") and note(accel, SAGE, "rejects" if stand_ins else "installed")
    accel.remove()


def test_a_layer_in_which_it_fails_keeps_the_exact_one(install, model):
    """The last layers of some models have keys that 8 bits cannot hold."""
    tiny, transformer = model
    seen = []

    def wrong_in_the_second_call(**arguments):
        seen.append(0)
        return (wrong if len(seen) == 2 else good)(**arguments)

    install({FP8: raises, SAGE: wrong_in_the_second_call, FP16: raises})
    with dit_accel.accelerated(transformer, "dense", dense_backend="auto8") as accel:
        run(transformer, tiny.call())
        chosen = [str(layer._attention_backend or "") for layer in transformer.attn_processors.values()]
        run(transformer, tiny.call())
        assert len(seen) == 3 and sum(bool(name) for name in chosen) == 1
        assert note(accel, SAGE, "1 layers") and note(accel, "own back end", "1 layers")
        assert note(accel, "auto8 rejects sage", "relative error")


def test_on_cuda_the_fastest_is_taken_and_none_that_is_slower_than_the_exact_one(install, model, monkeypatch):
    tiny, transformer = model
    install({FP8: good, SAGE: good, FP16: good})
    times = {None: 3.0, FP8: 4.0, SAGE: 2.0, FP16: 1.0}
    monkeypatch.setattr(Verified, "_milliseconds", lambda self, name, *others: times[name])
    with dit_accel.accelerated(transformer, "dense", dense_backend="auto8") as accel:
        run(transformer, tiny.call())
        assert note(accel, FP16, "2 layers") and note(accel, FP8, "4 ms")


def test_calls_with_other_tensors_are_verified_anew(install):
    """SageAttention takes no masks."""
    install({SAGE: good})
    verified, processor, ran = Verified(None), types.SimpleNamespace(_attention_backend=None), []

    def dense(mask):
        name = processor._attention_backend
        ran.append(None if name is None else name.value)
        if name is not None and (mask or name.value != SAGE):
            raise ValueError("attn_mask is not supported")
        return torch.ones(2), torch.ones(3)

    with torch.no_grad(), pytest.warns(DitAccelWarning):
        for mask in (False, True, False, True):
            tensors = torch.ones(1), torch.ones(1, 2) if mask else None
            verified.run("layer", processor, lambda mask=mask: dense(mask), tensors)
    assert ran == [None, FP8, SAGE, FP16, None, FP8, SAGE, FP16, SAGE, None]
    verified.run("layer", processor, lambda: dense(False), (torch.ones(1), None))  # gradients are enabled
    assert ran[10:] == [None] and any("gradients" in text for text in verified.notes)
    with torch.no_grad(), torch.device("cpu"):  # a function mode, as some guidance has
        verified.run("layer", processor, lambda: dense(False), (torch.ones(1), None))
    assert ran[10:] == [None, None]


def test_the_error_is_the_largest_of_all_outputs():
    exact = torch.tensor([3.0, 4.0]), torch.tensor([1.0])
    assert relative_error((exact[0], torch.tensor([1.5])), exact) == pytest.approx(0.5)
    assert relative_error((torch.tensor([3.0, 5.0]), exact[1]), exact) == pytest.approx(0.2)
    assert relative_error(exact, exact) == 0 == relative_error(torch.zeros(1), torch.zeros(1))
    for other in (torch.tensor([3.0, float("nan")]), torch.zeros(3), (exact[0], exact[0])):
        assert relative_error(other, exact[0]) == float("inf")


def test_compiled_calls_need_a_verified_one_before(install, model):
    tiny, transformer = model
    calls = install({FP8: good})
    with dit_accel.accelerated(transformer, "dense", dense_backend="auto8"):
        transformer.compile(backend="eager")
        with pytest.raises(dit_accel.DitAccelError, match="compiled"):
            run(transformer, tiny.call())
        transformer._compiled_call_impl = None
        run(transformer, tiny.call())
        eager = run(transformer, tiny.call())
        transformer.compile(backend="eager")
        torch.testing.assert_close(run(transformer, tiny.call()), eager)
        assert len(calls) > 4
        with pytest.raises(dit_accel.DitAccelError, match="gradients"):
            transformer(**tiny.call())
    torch.compiler.reset()


def test_processes_that_share_tokens_do_not_choose(install, model, monkeypatch):
    install({FP8: good})
    monkeypatch.setattr(several.context_parallel, "config_of", lambda transformer: object())
    monkeypatch.setattr(several.context_parallel, "check", lambda transformer, heads: None)
    with pytest.raises(dit_accel.DitAccelError, match="auto8"):
        dit_accel.accelerate(model[1], "dense", dense_backend="auto8")


def test_settings_take_it_and_kernels_of_the_hub_are_fetched_by_name_alone(install, model, monkeypatch):
    install({FP8: good})
    setting = dit_accel.Setting.parse("gna:window=full dense_steps=1 dense_backend=auto8")
    assert dit_accel.Setting.from_dict(setting.as_dict()) == setting
    fetched = []
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", fetched.append)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "is_kernels_version", lambda *version: True)
    with dit_accel.accelerated(model[1], "dense", dense_backend="auto8"):
        run(model[1], model[0].call())
    assert not fetched
    with dit_accel.accelerated(model[1], "dense", dense_backend="sage_hub"):
        assert fetched == [AttentionBackendName.SAGE_HUB]
