"""Dense attention of gathered problems, forward and backward: the arithmetic under `portable`.

A CPU runs the fused kernel behind PyTorch's `scaled_dot_product_attention`, in the dtype of the inputs. Other devices
run matrix products in fp32 (fp64 for fp64).

`Rows` moves rows between tensors [H, N, ...] and the batched problems [G, H, n, ...]. The tensors lie in memory as
[N, H, ...], so that all heads of a row move at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of queries, keys and values in one call. A CPU's kernel packs 16-bit keys of the whole call first, so a thread's
# cache bounds them; other devices need enough to be busy.
BYTES_PER_THREAD, BYTES_ELSEWHERE = 1 << 20, 1 << 26
# Logits in memory at a time: 4 MiB in fp32 on a CPU, to stay in cache, and 64 MiB elsewhere.
CPU_LOGITS, DEVICE_LOGITS = 1 << 20, 1 << 24

_aten = torch.ops.aten


def bytes_per_call(device: torch.device) -> int:
    """Bytes of queries, keys and values to compute at a time."""
    return BYTES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else BYTES_ELSEWHERE


def logits_at_once(device: torch.device) -> int:
    """How many logits to hold in memory at a time, where they are."""
    return CPU_LOGITS if device.type == "cpu" else DEVICE_LOGITS


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, blind: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of G problems with H heads each.

    Args:
        q: [G, H, nq, D], contiguous in the last dimension.
        k, v: [G, H, nk, D], likewise.
        bias: fp32 [nq, nk] or [G, 1, nq, nk], 0 or -inf.
        blind: bool [nq] or [G, 1, nq], rows without an allowed key; None if there are none.
        scale: factor of the logits.

    Returns:
        Output [G, H, nq, D] in q's dtype, in memory [G, nq, H, D]. Natural-log LSE [G, H, nq] in fp32 (fp64 for fp64).
        A blind row has output 0 and LSE -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if bias is not None:
        bias = bias.to(wide)
    if _fused(q):
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    else:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        keys, values = k.to(wide), v.to(wide)
        for rows in _row_chunks(q, k):
            logits = _logits(q[..., rows, :].to(wide), keys, bias, rows, scale)
            lse[..., rows] = logits.logsumexp(-1)
            out[..., rows, :] = logits.softmax(-1) @ values
    if blind is None:
        return out, lse
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    ds = p * (dp - delta) with p = exp(logits - lse) and dp = dO v'. A row has delta = sum(dO * O) - dLSE. This is
    FlashAttention's Algorithm 4 (arXiv:2205.14135), with the derivative of the log-sum-exp added. `out` and `lse` may
    come from more keys than the problem has; the gradients are then this problem's share.

    Args:
        grad_out, out: [G, H, nq, D].
        grad_lse: [G, H, nq] or None.
        lse: [G, H, nq]; -inf where a query sees no key at all.
        q, k, v, bias, scale: as in `forward`.
    """
    lse = lse.masked_fill(lse.isneginf(), float("inf"))  # weights of 0, also under a bias of -inf
    if bias is not None:
        bias = bias.to(torch.promote_types(q.dtype, torch.float32))
    if not _fused(q):
        return _backward_by_products(grad_out, grad_lse, q, k, v, out, lse, bias, scale)
    dim = q.shape[-1]
    if grad_lse is not None:
        # The kernel computes delta from dO and O. Two more columns of v, of ones, add dLSE to dp: dLSE in the inputs'
        # dtype, and its rounding error.
        near = grad_lse.to(q.dtype)
        grad_out = torch.cat([grad_out, torch.stack([near, (grad_lse - near).to(q.dtype)], -1)], -1)
        q, k, out, v = F.pad(q, (0, 2)), F.pad(k, (0, 2)), F.pad(out, (0, 2)), F.pad(v, (0, 2), value=1.0)
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
    )
    return tuple(grad[..., :dim] for grad in grads)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds the softmax over further keys to that over other keys, in place: outputs [..., D], LSE [...]."""
    share = (part_lse - lse).sigmoid_().nan_to_num_(0.0)[..., None]  # nan where neither has a key
    wide = torch.promote_types(out.dtype, lse.dtype)
    if out.dtype == wide:
        out.lerp_(part.to(wide), share)
    else:
        out.copy_(torch.lerp(out.to(wide), part.to(wide), share))
    torch.logaddexp(lse, part_lse, out=lse)


def _backward_by_products(grad_out, grad_lse, q, k, v, out, lse, bias, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(wide), v.to(wide)
    grad_q = torch.empty_like(q, dtype=wide)
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _row_chunks(q, k):
        queries, upstream, result = (x[..., rows, :].to(wide) for x in (q, grad_out, out))
        delta = (upstream * result).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse[..., rows]
        weights = _logits(queries, keys, bias, rows, scale).sub_(lse[..., rows, None]).exp_()
        grad_v += weights.mT @ upstream
        grad_logits = (upstream @ values.mT).sub_(delta[..., None]).mul_(weights)
        grad_q[..., rows, :] = (grad_logits @ keys).mul_(scale)
        grad_k += (grad_logits.mT @ queries).mul_(scale)
    return grad_q, grad_k, grad_v


def _fused(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, rows: slice, scale: float) -> Tensor:
    logits = (q @ k.mT).mul_(scale)
    return logits if bias is None else logits.add_(bias[..., rows, :])


def _row_chunks(q: Tensor, k: Tensor) -> list[slice]:
    step = max(1, logits_at_once(q.device) // (q[..., 0, 0].numel() * k.shape[2]))
    return [slice(start, start + step) for start in range(0, q.shape[-2], step)]


class Rows:
    """Rows of G problems, n each: `index` int64 [G, n]. Consecutive rows of equally distant problems are views."""

    def __init__(self, index: Tensor) -> None:
        self.index, self.shape = index, index.shape
        first = index[:, 0]
        self.start, self.step = int(first[0]), int(first[1] - first[0]) if len(index) > 1 else 0
        groups, places = (torch.arange(size, device=index.device) for size in index.shape)
        expected = self.start + self.step * groups[:, None] + places
        self.consecutive = self.step >= 0 and torch.equal(index, expected)

    def __getitem__(self, groups: slice) -> Rows:
        """Some of the problems."""
        some = object.__new__(Rows)
        some.index, some.consecutive, some.step = self.index[groups], self.consecutive, self.step
        some.shape, some.start = some.index.shape, self.start + self.step * (groups.start or 0)
        return some

    def _view(self, x: Tensor) -> Tensor:
        head, row, *rest = x.stride()
        shape, offset = (self.shape[0], len(x), self.shape[1], *x.shape[2:]), self.start * row
        return x.as_strided(shape, (self.step * row, head, row, *rest), x.storage_offset() + offset)

    def of(self, x: Tensor) -> Tensor:
        """Rows of x [H, N, ...] as [G, H, n, ...]."""
        if self.consecutive:
            return self._view(x)
        return x.transpose(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.shape).transpose(1, 2)

    def write(self, x: Tensor, values: Tensor) -> None:
        """The inverse of `of`; no row may come twice."""
        if self.consecutive:
            self._view(x).copy_(values)
        else:
            target, values = _words(x.transpose(0, 1)), _words(values.transpose(1, 2).flatten(0, 1))
            target.index_copy_(0, self.index.flatten(), values)

    def add(self, x: Tensor, values: Tensor) -> None:
        """Add values [G, H, n, ...] to their rows in a fixed order; a row may come more than once."""
        if self.consecutive:
            for group, part in enumerate(values):
                self[slice(group, group + 1)]._view(x)[0].add_(part)
            return
        target, values = x.transpose(0, 1), values.transpose(1, 2).flatten(0, 1).to(x.dtype)
        if x.device.type == "cpu":  # elsewhere index_add_ is atomic, in any order
            target.index_add_(0, self.index.flatten(), values)
        else:  # an accumulating index_put_ sorts
            target.index_put_((self.index.flatten(),), values, accumulate=True)


def _words(x: Tensor) -> Tensor:
    """x in words of 16 bytes, if it divides into them: PyTorch copies words 1.5 to 3 times as fast."""
    parts = (x.shape[-1], *x.stride()[:2], x.storage_offset())
    wide = x.ndim == 3 and x.stride(2) == 1 and all(n * x.element_size() % 16 == 0 for n in parts)
    return x.view(torch.complex128) if wide else x


def rows_first(x: Tensor) -> Tensor:
    """x [H, N, ...] in memory [N, H, ...], copied only if it is not."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def empty_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """Results of queries without key: output 0 [B, H, N, D], in memory [B, N, H, D], and LSE -inf [B, H, N]."""
    return zeros_spread(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))


def zeros_spread(x: Tensor) -> Tensor:
    """Zeros of the shape of x [B, H, N, D], in memory [B, N, H, D]."""
    return torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
