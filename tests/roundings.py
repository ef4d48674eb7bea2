"""What is rounded on the way to the gradients of attention, as sums of magnitudes: what tolerances are derived from."""

import torch
from accuracy import assert_accurate, error_budget, plain_attention


def gradient_sizes(q, k, v, grad_out, out, logits, lse, scale, dtype, grad_lse=None):
    """Sizes of the terms in dq, dk and dv, by name, in fp64; terms of dq and dk cancel.

    A logit's gradient p (dp - delta + dlse) counts as p (|dp| + |delta| + |dlse|). A fused backward makes p anew as
    exp(logit - lse) from fp32 numbers. Each is rounded and multiplied by rounded constants (scale, log2 e): together
    eps(fp32) * 2 |lse|. The logit is summed in another order than in the forward: a random walk of D roundings, at most
    eps(fp32) * scale * sum |q k|. PyTorch's own fused attention does the same.

    Args:
        q, k, v, grad_out, out: fp64 [..., N, D].
        logits: scaled and masked, [..., Nq, Nk].
        lse, grad_lse: [..., Nq].
        dtype: of the call whose error is judged.
    """
    anew = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    exponent = 2 * lse.abs()[..., None] + q.abs() @ k.abs().mT * abs(scale)
    p = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None]) * (1 + anew * exponent)
    delta = (grad_out * out).abs().sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta + grad_lse.abs()[..., None]
    terms = p * (grad_out.abs() @ v.abs().mT + delta) * abs(scale)
    return {"dq": terms @ k.abs(), "dk": terms.mT @ q.abs(), "dv": p.mT @ grad_out.abs()}


def tolerance(q, k, v, parts=1.0):
    """How far an attention call may be from the exact one: twice the error of plain dense attention, and roundings.

    `parts`: roundings of eps / 2 besides, in eps. No part of the output is larger than the average of |v|.
    """
    every, scale = torch.ones(1, 1, dtype=torch.bool), q.shape[-1] ** -0.5
    wide = [x.double() for x in (q, k, v)]
    plain, exact = plain_attention(q, k, v, every, scale)[0], plain_attention(*wide, every, scale)[0]
    return error_budget(plain, exact, parts * plain_attention(*wide[:2], wide[2].abs(), every, scale)[0])


def assert_dense(out, q, k, v, parts=1.0):
    """Check that a call equals dense attention over all tokens."""
    exact = plain_attention(*(x.double() for x in (q, k, v)), torch.ones(1, 1, dtype=torch.bool), q.shape[-1] ** -0.5)
    error = (out.double() - exact[0]).abs().max().item()
    assert error <= tolerance(q, k, v, parts), f"error {error:.3e}"  # also fails for NaN


def assert_masked(attend, tensors, gradient, mask):
    """Check a call and its gradients, in fp32, against masked attention over the pairs of `mask`.

    Args:
        attend: (q, k, v) to the output, which should lie in memory as [B, N, H, D].
        tensors, gradient: q, k and v, and the output's gradient, fp32 [B, H, N, D].
        mask: bool [B, H, N, N].
    """
    scale = tensors[0].shape[-1] ** -0.5

    def results(attend, dtype):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    def masked(q, k, v):
        return plain_attention(q, k, v, mask, scale)[0]

    got = results(attend, torch.float32)
    plain, exact = results(masked, torch.float32), results(masked, torch.float64)
    q, k, v = (x.double() for x in tensors)
    logits = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    sizes = gradient_sizes(q, k, v, gradient.double(), exact[0], logits, lse, scale, torch.float32)
    for name, *values in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_accurate(name, *values, magnitude=sizes.get(name))
    assert got[0].transpose(1, 2).is_contiguous()
