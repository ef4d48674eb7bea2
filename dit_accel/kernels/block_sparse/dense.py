"""Dense attention on small gathered problems, forward and backward: the arithmetic under `portable`.

On a CPU this is PyTorch's fused kernel, which returns the log-sum-exp and never holds the logits. Elsewhere, and for
the gradient of the log-sum-exp, which that kernel does not know, it is written out in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch

# Logits held at a time where they are written out: 16M of them are 64 MiB in fp32.
LOGITS = 1 << 24

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Bias = torch.Tensor | None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Bias, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [G, H, nq, D] and LSE [G, H, nq] of q [G, H, nq, D] over k, v [G, H, nk, D].

    `bias` is 0 or -inf, broadcastable to [G, H, nq, nk]; a row that it forbids wholly has output 0 and an LSE that
    means nothing.
    """
    if q.device.type == "cpu":
        return _fused(q, k, v, attn_mask=_expanded(bias, q, k), scale=scale)
    outs, lses = [], []
    for rows in _row_chunks(q, k):
        logits = _logits(q, k, bias, scale, rows)
        lse = torch.logsumexp(logits, -1)
        weights = logits.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
        outs.append((weights @ v.to(weights.dtype)).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: Bias,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v for the gradients of the output [G, H, nq, D] and of the LSE [G, H, nq] (None: zero).

    ds = p * (dp - delta + dlse) with p = exp(s - lse), dp = dO v', delta = sum(dO * O) per row: FlashAttention
    (arXiv:2205.14135), Algorithm 4, and the derivative of the log-sum-exp. `lse` must be finite.
    """
    if q.device.type == "cpu" and grad_lse is None:
        return _fused_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=_expanded(bias, q, k, q.dtype), scale=scale
        )
    high = lse.dtype
    delta = (grad_out.to(high) * out.to(high)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    keys, values = k.to(high), v.to(high)
    grad_q, grad_k, grad_v = [], torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _row_chunks(q, k):
        weights = _logits(q, k, bias, scale, rows).sub_(lse[:, :, rows, None]).exp_()
        upstream = grad_out[:, :, rows].to(high)
        grad_v += weights.transpose(-1, -2) @ upstream
        grad_logits = (upstream @ values.transpose(-1, -2)).sub_(delta[:, :, rows, None]).mul_(weights).mul_(scale)
        grad_q.append(grad_logits @ keys)
        grad_k += grad_logits.transpose(-1, -2) @ q[:, :, rows].to(high)
    return torch.cat(grad_q, 2), grad_k, grad_v


def _logits(q: torch.Tensor, k: torch.Tensor, bias: Bias, scale: float, rows: slice) -> torch.Tensor:
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (q[:, :, rows].to(high) @ k.to(high).transpose(-1, -2)).mul_(scale)
    return logits if bias is None else logits.add_(bias if bias.shape[2] == 1 else bias[:, :, rows])


def _row_chunks(q: torch.Tensor, k: torch.Tensor) -> list[slice]:
    per_row = q.shape[0] * q.shape[1] * k.shape[2]
    step = max(1, LOGITS // per_row)
    return [slice(start, start + step) for start in range(0, q.shape[2], step)]


def _expanded(bias: Bias, q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype | None = None) -> Bias:
    """The fused kernel wants the mask's rows spelled out, and in double for double."""
    if bias is None:
        return None
    if dtype is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return bias.to(dtype).expand(bias.shape[0], bias.shape[1], q.shape[2], k.shape[2])
