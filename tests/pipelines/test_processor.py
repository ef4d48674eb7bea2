"""Processors rebuilt with another attention."""

import inspect
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from messages import names
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.attention import CallState
from dit_accel.pipelines.processor import wrap_processor
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid


class MeanPlan:
    """Attention that gives every query the mean of all values, so that nobody takes it for dense attention."""

    method = "mean"

    def __init__(self, grid):
        self.grid, self.calls = grid, []

    def run(self, q, k, v, call):
        self.calls.append((tuple(q.shape), call.scale, call.impl, call.module))
        return v.mean(2, keepdim=True).expand_as(v)


def sparse_state(tokens, text_lens=None):
    state = CallState("portable")
    state.plan, state.sparse, state.text_lens = MeanPlan(TokenGrid(1, 1, tokens)), True, text_lens
    return state


@pytest.mark.parametrize("kind", [WanAttnProcessor, FluxAttnProcessor, AttnProcessor2_0])
def test_the_signature_is_the_models(kind):
    wrapped = wrap_processor(kind(), CallState())
    assert inspect.signature(wrapped.__call__) == inspect.signature(kind().__call__)


def test_each_class_has_one_rebuilt_module_for_good():
    first, second = (wrap_processor(WanAttnProcessor(), CallState()) for _ in range(2))
    assert type(first) is type(second)
    prefix = f"dit_accel._rebuilt.{WanAttnProcessor.__module__}.WanAttnProcessor."
    rebuilt = [name for name in sys.modules if name.startswith(prefix)]
    assert len(rebuilt) == 1
    assert not any(isinstance(value, CallState) for value in vars(sys.modules[rebuilt[0]]).values())


def test_the_models_module_is_not_touched():
    before = dict(vars(sys.modules[WanAttnProcessor.__module__]))
    wrap_processor(WanAttnProcessor(), CallState())
    assert dict(vars(sys.modules[WanAttnProcessor.__module__])) == before


def test_a_legacy_processor_keeps_its_code_around_our_attention():
    """BHND tensors through `F.scaled_dot_product_attention`."""
    torch.manual_seed(0)
    attention, hidden = Attention(query_dim=8, heads=2, dim_head=4).eval(), torch.randn(2, 6, 8)
    state = sparse_state(6)
    attention.processor = wrap_processor(AttnProcessor2_0(), state)
    wanted = attention.to_out[0](attention.to_v(hidden).mean(1, keepdim=True).expand(2, 6, 8))
    torch.testing.assert_close(attention(hidden), wanted)
    assert state.plan.calls == [((2, 2, 6, 4), None, "portable", None)]


def test_a_legacy_processor_compiles():
    attention, hidden = Attention(query_dim=8, heads=2, dim_head=4).eval(), torch.randn(2, 6, 8)
    state = sparse_state(6)
    state.plan = plan("gna", state.plan.grid, window=(1, 1, 3))
    state.plan.prepare(hidden.device, hidden.dtype, head_dim=4)
    attention.processor = wrap_processor(AttnProcessor2_0(), state)
    eager = attention(hidden)
    torch.testing.assert_close(torch.compile(attention, backend="aot_eager", fullgraph=True)(hidden), eager)


def test_other_attention_in_the_same_module_stays_dense():
    """Calls over other tokens, such as image prompts, are not the plan's."""

    class TwoCalls:
        def __call__(self, attn, hidden_states):
            prompt = F.scaled_dot_product_attention(hidden_states, hidden_states[:, :, :2], hidden_states[:, :, :2])
            return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states), prompt

    hidden = torch.randn(1, 2, 6, 4)
    attended, prompt = wrap_processor(TwoCalls(), sparse_state(6))(nn.Module(), hidden)
    assert torch.equal(attended, hidden.mean(2, keepdim=True).expand_as(hidden))
    assert torch.equal(prompt, TwoCalls()(None, hidden)[1])


def test_a_call_of_another_length_is_refused():
    attention = Attention(query_dim=8, heads=2, dim_head=4).eval()
    attention.processor = wrap_processor(AttnProcessor2_0(), sparse_state(7))
    with pytest.raises(DitAccelError, match=names("0")):
        attention(torch.randn(2, 6, 8))


def test_a_mask_is_refused_unless_the_family_reads_it():
    attention = Attention(query_dim=8, heads=2, dim_head=4).eval()
    mask = torch.zeros(2, 1, 6)
    attention.processor = wrap_processor(AttnProcessor2_0(), sparse_state(6))
    with pytest.raises(DitAccelError, match=names("mask")):
        attention(torch.randn(2, 6, 8), attention_mask=mask)
    attention.processor = wrap_processor(AttnProcessor2_0(), sparse_state(6, text_lens=torch.tensor([0, 0])))
    attention(torch.randn(2, 6, 8), attention_mask=mask)


def test_causal_attention_and_dropout_are_refused():
    class Causal:
        def __call__(self, attn, hidden_states):
            return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states, is_causal=True)

    with pytest.raises(DitAccelError, match=names("is_causal=True")):
        wrap_processor(Causal(), sparse_state(6))(nn.Module(), torch.randn(1, 2, 6, 4))


def test_a_class_that_was_patched_since_runs_its_new_code(monkeypatch):
    class Processor:
        def __call__(self, attn, hidden_states):
            return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)

    def patched(self, attn, hidden_states):
        return 1 + F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)

    q = torch.randn(1, 2, 7, 8)
    before = wrap_processor(Processor(), sparse_state(7))(nn.Identity(), q)
    monkeypatch.setattr(Processor, "__call__", patched)
    assert torch.equal(wrap_processor(Processor(), sparse_state(7))(nn.Identity(), q), before + 1)


def test_an_error_leaves_nothing_behind():
    state = sparse_state(7)
    attention = Attention(query_dim=8, heads=2, dim_head=4).eval()
    attention.processor = wrap_processor(AttnProcessor2_0(), state)
    with pytest.raises(DitAccelError):
        attention(torch.randn(2, 6, 8))
    attention(torch.randn(2, 7, 8))


def test_threads_do_not_see_each_others_plan():
    """Two models of one processor class, in two threads that meet in the middle of their attention calls."""
    meeting, results = threading.Barrier(2, timeout=120), {}

    class Waiting(MeanPlan):
        def run(self, q, k, v, call):
            meeting.wait()
            return super().run(q, k, v, call) + self.grid.tokens

    class Plain:
        def __call__(self, attn, hidden_states):
            meeting.wait()
            return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)

    def run(tokens):
        state = sparse_state(tokens)
        state.plan = Waiting(state.plan.grid)
        results[tokens] = wrap_processor(Plain(), state)(nn.Module(), torch.zeros(1, 2, tokens, 4))

    threads = [threading.Thread(target=run, args=(tokens,)) for tokens in (6, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {tokens: result.unique().tolist() for tokens, result in results.items()} == {6: [6.0], 7: [7.0]}


def test_what_cannot_be_rebuilt_is_refused():
    class Silent:
        def __call__(self, attn, hidden_states):
            return hidden_states

    for processor, reason in ((Silent(), "calls neither"), (len, "not a processor written in Python")):
        with pytest.raises(DitAccelError, match=reason):
            wrap_processor(processor, CallState())


def test_back_end_and_parallel_settings_reach_the_model():
    inner = WanAttnProcessor()
    wrapped = wrap_processor(inner, CallState())
    wrapped._attention_backend, wrapped._parallel_config = "native", "config"
    assert (inner._attention_backend, inner._parallel_config) == ("native", "config")
    bare = wrap_processor(AttnProcessor2_0(), CallState())
    assert not hasattr(bare, "_attention_backend")
