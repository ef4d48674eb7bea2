"""What is rounded on the way to the gradients of attention, as sums of magnitudes: what tolerances are derived from."""

import torch


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
