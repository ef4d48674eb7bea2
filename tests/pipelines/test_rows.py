"""Samples whose tokens lie at rows of their own, each as if it were alone, and padded text that is weighed, not masked.

The Triton kernels run here on a GPU, or under the interpreter (``TRITON_INTERPRET=1``, in a process of its own).
"""

import importlib.util
import inspect
import os

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, plain_attention
from torch import nn

import dit_accel
from dit_accel.pipelines.attention import CallState
from dit_accel.pipelines.family import Memory, ModelInputs
from dit_accel.pipelines.padded_images import pack
from dit_accel.pipelines.processor import wrap_processor
from dit_accel.pipelines.reading import bias_text, mask_text

GRID = dit_accel.TokenGrid(1, 4, 5, text=6, text_first=True)
LENS = torch.tensor([6, 2, 1], dtype=torch.int32)
CONFIG = {"window": (1, 3, 2)}
HEADS, DIM = 2, 16
SCALE = DIM**-0.5
HAS_TRITON = importlib.util.find_spec("triton") is not None and (
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
)
IMPLS = ["reference", "portable", *(["triton"] if HAS_TRITON else [])]


class Processor:
    """Attention of q, k and v as they come."""

    def __call__(self, attn, hidden_states):
        return F.scaled_dot_product_attention(*hidden_states)


def state(impl, rows, lens):
    call_state = CallState(impl)
    call_state.set(dit_accel.plan("gna", GRID, **CONFIG), lens, rows=rows)
    return call_state


def samples(valid):
    """q, k, v and the output's gradient of each sample, [4, H, n, D], by the tokens that count for it."""
    torch.manual_seed(0)
    return [torch.randn(4, HEADS, n, DIM) for n in valid]


def alone(tensors, lens, dtype):
    """Output and gradients of one sample without padding, by name, and the size of the terms in those that cancel."""
    grid = dit_accel.TokenGrid(*GRID.shape, text=lens, text_first=True)
    mask = dit_accel.plan("gna", grid, **CONFIG).token_mask()
    q, k, v, grad_out = (x.to(dtype) for x in tensors)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = plain_attention(*inputs, mask, SCALE)
    grads = torch.autograd.grad(out, inputs, grad_out)
    weights = torch.exp((q @ k.mT * SCALE).masked_fill(~mask, float("-inf")) - lse[..., None])
    terms = weights * (grad_out.abs() @ v.abs().mT + (grad_out * out).abs().sum(-1, keepdim=True)) * SCALE
    names = dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))
    return names, {"dq": terms @ k.abs(), "dk": terms.mT @ q.abs()}


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_samples_are_as_if_alone(impl):
    """[caption | image | padding] with captions of 6, 2 and 1 tokens; what lies in the padding changes nothing."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    counted = [int(n) + GRID.visual for n in LENS]
    parts = samples(counted)
    packed = torch.full((4, len(LENS), HEADS, GRID.tokens, DIM), 1e3)
    for index, (part, n) in enumerate(zip(parts, counted, strict=True)):
        packed[:, index, :, :n] = part
        packed[3, index, :, n:] = 0  # nobody asks for the output of padding
    qkv = packed[:3].to(device).requires_grad_()
    output = wrap_processor(Processor(), state(impl, pack(GRID, LENS).to(device), LENS.to(device)))(nn.Module(), qkv)
    (grads,) = torch.autograd.grad(output, qkv, packed[3].to(device))
    results = torch.cat((output[None], grads)).detach().cpu()
    for index, (part, n) in enumerate(zip(parts, counted, strict=True)):
        exact, magnitudes = alone(part, n - GRID.visual, torch.float64)
        plain, _ = alone(part, n - GRID.visual, torch.float32)
        for place, name in enumerate(("out", "dq", "dk", "dv")):
            result = results[place, index]
            assert_accurate(f"{name}[{index}]", result[:, :n], plain[name], exact[name], magnitudes.get(name))
        assert not results[1:, index, :, n:].any(), "padding has no gradient"


def test_every_row_of_a_packed_sequence_is_used_once():
    rows = pack(GRID, LENS)
    assert torch.equal(rows.sort(1).values, torch.arange(GRID.tokens).expand(3, -1))
    assert rows[1].tolist() == [0, 1, *range(22, 26), *range(2, 22)]


def weighed(tensors, mask, added, dtype):
    """Output and gradients where the products of a mask are added to the logits, and terms as of `alone`."""
    q, k, v, grad_out = (x.to(dtype) for x in tensors)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    logits = (inputs[0] @ inputs[1].mT * SCALE + added.to(dtype)).masked_fill(~mask, float("-inf"))
    weights = logits.softmax(-1)
    out = weights @ inputs[2]
    grads = torch.autograd.grad(out, inputs, grad_out)
    terms = weights * (grad_out.abs() @ v.abs().mT + (grad_out * out).abs().sum(-1, keepdim=True)) * SCALE
    names = dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))
    return names, {"dq": terms @ k.abs(), "dk": terms.mT @ q.abs()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("method", "config"), [("gna", CONFIG), ("sla", {"topk": 1.0, "block": 16})])
def test_padding_that_is_weighed_and_not_masked(method, config, impl):
    """A mask of ones and zeros that the model adds, its padding in any place, in one sample none."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0]]).float()
    call = ModelInputs(inspect.signature(lambda self, mask: None), nn.Module(), (valid,), {}, Memory())
    layout = bias_text(call, GRID, valid)
    call_state, plan = CallState(impl), dit_accel.plan(method, GRID, **config)
    call_state.set(plan, *(x.to(device) for x in (layout.text_lens, layout.text_bias, layout.rows)))
    torch.manual_seed(2)
    tensors = torch.randn(4, 3, HEADS, GRID.tokens, DIM)
    qkv = tensors[:3].to(device).requires_grad_()
    output = wrap_processor(Processor(), call_state)(nn.Module(), qkv)
    (grads,) = torch.autograd.grad(output, qkv, tensors[3].to(device))
    mask = plan.token_mask() if method == "gna" else torch.ones(GRID.tokens, GRID.tokens, dtype=torch.bool)
    every = torch.cat((valid, torch.ones(3, GRID.visual)), 1)
    added = (every[:, :, None] * every[:, None, :])[:, None]
    exact, magnitudes = weighed(tensors, mask, added, torch.float64)
    plain, _ = weighed(tensors, mask, added, torch.float32)
    for result, name in zip((output, *grads), ("out", "dq", "dk", "dv"), strict=True):
        assert_accurate(name, result.detach().cpu(), plain[name], exact[name], magnitudes.get(name))


def test_text_masked_in_any_pattern_is_never_a_key():
    valid = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
    call = ModelInputs(inspect.signature(lambda self, mask: None), nn.Module(), (valid,), {}, Memory())
    layout = mask_text(call, GRID, valid)
    assert layout.text_lens.tolist() == [4, 2, 1]
    torch.manual_seed(1)
    qkv = torch.randn(3, 3, HEADS, GRID.tokens, DIM)
    output = wrap_processor(Processor(), state("reference", layout.rows, layout.text_lens))(nn.Module(), qkv)
    mask = dit_accel.plan("gna", GRID, **CONFIG).token_mask()
    keys = torch.cat((valid.bool(), torch.ones(3, GRID.visual, dtype=torch.bool)), 1)
    mask = mask & keys[:, None, None, :]
    exact, _ = plain_attention(*qkv.double(), mask, SCALE)
    plain, _ = plain_attention(*qkv, mask, SCALE)
    assert_accurate("out", output, plain, exact)
