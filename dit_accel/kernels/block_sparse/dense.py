"""Dense attention of one gathered problem, forward and backward: the arithmetic under `portable`.

Everything is in fp32 (fp64 for fp64) whatever the inputs' dtype. On a CPU the products go through oneDNN, which PyTorch
carries for its compiled linear layers: measured on AMD Zen 5 in fp32, 1 thread, 256 x 1100 x 64, it reaches 210 GFLOP/s
where `torch.matmul` (MKL) reaches 95; with the softmax between two products that is 145 against 80 for the fused kernel
of scaled_dot_product_attention.
"""

from __future__ import annotations

import torch

# Logits held at a time on a CPU, where problems come one by one: 4 MiB in fp32, so that they stay in cache.
CPU_LOGITS = 1 << 20
# And elsewhere, where they come in batches: 64 MiB.
DEVICE_LOGITS = 1 << 24
# An fp32 product's error grows with its depth, so keys are summed in runs: of a quarter of them, within these limits.
RUNS, SHORTEST, LONGEST = 4, 128, 512

_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def high_precision(dtype: torch.dtype) -> torch.dtype:
    """The type that the arithmetic is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [..., nq, D] and natural-log LSE [..., nq] of q [..., nq, D] over k, v [..., nk, D].

    Args:
        q, k, v: high precision, each matrix contiguous; leading dimensions only off the CPU.
        bias: [..., nq, nk], 0 or -inf; a row that it forbids wholly has output 0 and LSE -inf.
        scale: factor on the logits.
    """
    outs, lses = [], []
    for rows in _row_chunks(q, k):
        weights, top = _weights(q[..., rows, :], k, bias, scale, rows)
        # The largest weight is exp(top - lse).
        lse = top - weights.amax(-1).log_()
        out = _weighted_sum(weights, v)
        if bias is not None:
            blind = top == float("-inf")
            out.masked_fill_(blind[..., None], 0.0)
            lse.masked_fill_(blind, float("-inf"))
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, -2), torch.cat(lses, -1))


def backward(
    grad_out: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v.

    ds = p * (dp - delta) with dp = dO v' and, per row, delta = sum(dO * O) - dLSE: FlashAttention (arXiv:2205.14135),
    Algorithm 4, with the derivative of the log-sum-exp added. A problem holds all keys of its queries, so that p is
    the softmax itself and the LSE is not needed.

    Args:
        grad_out: [..., nq, D].
        delta: [..., nq].
        q, k, v, bias, scale: as in `forward`.
    """
    grads_q: list[torch.Tensor] = []
    grad_k, grad_v = (torch.zeros_like(x).mT.contiguous() for x in (k, v))  # [..., D, nk], as the products come
    for rows in _row_chunks(q, k):
        queries, upstream = q[..., rows, :], grad_out[..., rows, :]
        weights, top = _weights(queries, k, bias, scale, rows)
        if bias is not None:
            weights.masked_fill_((top == float("-inf"))[..., None], 0.0)
        grad_logits = _matmul(upstream, v.mT).sub_(delta[..., rows, None]).mul_(weights)
        grads_q.append(_matmul(grad_logits, k).mul_(scale))
        grad_k += _matmul(queries.mT.contiguous(), grad_logits).mul_(scale)
        grad_v += _matmul(upstream.mT.contiguous(), weights)
    return torch.cat(grads_q, -2), grad_k.mT, grad_v.mT


def _weights(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights [..., nq, nk] and each row's largest logit [..., nq]; rows without keys are nan and -inf."""
    logits = _matmul(q, k.mT)
    if scale != 1.0:
        logits.mul_(scale)
    if bias is not None:
        logits.add_(bias[..., rows, :])
    top = logits.amax(-1)
    return torch.softmax(logits, -1, out=logits), top


def _weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weights @ values, in runs of keys."""
    run = min(max(-(-values.shape[-2] // RUNS), SHORTEST), LONGEST)
    first, *others = zip(weights.split(run, -1), values.split(run, -2), strict=True)
    total = _matmul(first[0].contiguous(), first[1])
    for part, rows in others:
        total.add_(_matmul(part.contiguous(), rows))
    return total


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, where a is contiguous and b is contiguous or the transpose of a contiguous matrix.

    oneDNN falls back to a loop a thousand times slower for any other strides.
    """
    if _linear is None or a.device.type != "cpu" or a.dtype != torch.float32 or a.ndim != 2:
        return a @ b
    return _linear(a, b.mT, None, "none", [], "")


def _row_chunks(q: torch.Tensor, k: torch.Tensor) -> list[slice]:
    problems = q[..., 0, 0].numel()
    limit = CPU_LOGITS if q.device.type == "cpu" else DEVICE_LOGITS
    step = max(1, limit // (problems * k.shape[-2]))
    return [slice(start, start + step) for start in range(0, q.shape[-2], step)]
