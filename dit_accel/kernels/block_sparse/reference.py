"""The definition of block-sparse attention: build the token mask, then softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import (
    BlockLists,
    BlockSparseInputs,
    Geometry,
    query_placement,
    read_placements,
)

MAX_TOKENS = 20_000
# Keys of one product, as in a kernel that skips blocks. MKL's fp32 error depends on it: on gna's windows of 512 tokens
# it is 7.0e-7. Products with 8,192 columns have 3.4e-7.
RUN = 512
_KIND_BAND = 1
_HEADER_WORDS = 8


def allowed_pairs(tables: Tensor, geometry: Geometry) -> Tensor:
    """The packed predicate over all visual pairs: bool [visual queries, visual keys].

    `tables` is int32 [words]. Word 0 is the number n of terms. n headers of eight words follow: ``[kind, off_t, off_h,
    off_w, step_t, step_h, step_w, 0]``.

    Kind 0 is a product of three axis tables. A table has a (start, stop) pair for each query coordinate. On an axis,
    query i sees key j iff start <= j < stop and (j - start) % step == 0.

    Kind 1 is a band. off_t is the offset of a table of radii [query frames, key frames]. A pair is allowed iff its
    raster positions h * W + w differ by less than the radius of its frames.
    """
    words = tables.long()
    axes_q, axes_k = _coordinates(geometry.query_grid, words.device), _coordinates(geometry.grid, words.device)
    allowed = torch.zeros(axes_q.shape[1], axes_k.shape[1], dtype=torch.bool, device=words.device)
    for term in range(int(words[0])):
        kind, *rest = words[1 + _HEADER_WORDS * term : 1 + _HEADER_WORDS * (term + 1)].tolist()
        if kind == _KIND_BAND:
            allowed |= _band(words, rest[0], axes_q, axes_k, geometry)
            continue
        product = torch.ones_like(allowed)
        for axis in range(3):
            offset, step, length = rest[axis], rest[3 + axis], geometry.query_grid[axis]
            start, stop = words[offset : offset + 2 * length].reshape(length, 2)[axes_q[axis]].T
            key = axes_k[axis]
            product &= (key >= start[:, None]) & (key < stop[:, None]) & ((key - start[:, None]) % step == 0)
        allowed |= product
    return allowed


def _band(words: Tensor, offset: int, axes_q: Tensor, axes_k: Tensor, geometry: Geometry) -> Tensor:
    frames_q, frames_k = geometry.query_grid[0], geometry.grid[0]
    radius = words[offset : offset + frames_q * frames_k].reshape(frames_q, frames_k)
    place_q = axes_q[1] * geometry.query_grid[2] + axes_q[2]
    place_k = axes_k[1] * geometry.grid[2] + axes_k[2]
    return (place_q[:, None] - place_k).abs() < radius[axes_q[0][:, None], axes_k[0]]


def _coordinates(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Frame, row and column of every visual token: int64 [3, visual]."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in shape)).reshape(-1, 3).T


def token_mask(lists: BlockLists, geometry: Geometry) -> Tensor:
    """The canonical keys that each canonical query sees: bool [..., queries, keys], leading dimensions of the lists."""
    device, tables, used = lists.indices.device, lists.tables, lists.used
    block_of_q = geometry.query_order.block_of_token().to(device)
    block_of_k = geometry.key_order.block_of_token().to(device)
    key_blocks = geometry.key_order.blocks
    mask = lists.map(used, key_blocks)[..., block_of_q, :][..., block_of_k]
    if tables is not None:
        check = used if lists.partial is None else used & lists.partial
        checked = lists.map(check, key_blocks)[..., block_of_q, :][..., block_of_k]
        allowed = torch.ones(mask.shape[-2:], dtype=torch.bool, device=device)
        pairs = allowed_pairs(tables, geometry)
        allowed[: pairs.shape[0], : pairs.shape[1]] = pairs
        mask = mask & (allowed | ~checked)
    return mask


def forward(call: BlockSparseInputs) -> tuple[Tensor, Tensor]:
    """Masked dense attention by plain autograd, in fp64 for fp64 inputs and in fp32 otherwise.

    Returns:
        The output [B, H, Nq, D] in q's dtype, in memory [B, Nq, H, D]. The natural-log LSE [B, H, Nq] in the dtype of
        the computation.

    Raises:
        DitAccelError: there are more than 20,000 queries or keys.
    """
    q, k, v, lists, segments, geometry, scale = call
    longest = max(q.shape[2], k.shape[2])
    if longest > MAX_TOKENS:
        raise DitAccelError(
            f"impl='reference' builds a dense mask and takes at most {MAX_TOKENS} tokens, got {longest}. Use "
            "impl='portable' or 'auto'."
        )
    mask = token_mask(lists, geometry)
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    grid = geometry.key_order.grid
    outs, lses = [], []
    for b, place in enumerate(read_placements(geometry, len(q), k.shape[2], segments)):
        rows = query_placement(geometry, place).positions(geometry.query_order.grid).to(q.device)
        columns = place.positions(grid).to(q.device)
        valid = torch.arange(len(columns), device=q.device) < grid.visual + grid.conditioning + place.text_len
        allowed = (mask[b] if mask.ndim == 4 else mask) & valid
        # forbidden keys are never read: a NaN in them would reach the sums as 0 * nan
        logits = (q[b][:, rows].to(high) @ k[b][:, columns[valid]].to(high).transpose(-1, -2)) * scale
        logits = logits.masked_fill(~allowed[..., valid], float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        out = weights @ v[b][:, columns[valid]].to(high)
        outs.append(q.new_zeros(q.shape[1:]).index_copy(1, rows, out.to(q.dtype)))
        lses.append(lse.new_full(lse.shape[:1] + q.shape[2:3], float("-inf")).index_copy(1, rows, lse))
    return torch.stack(outs).transpose(1, 2).contiguous().transpose(1, 2), torch.stack(lses)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention of any queries over the pairs that `seen` marks, in the inputs' dtype: [..., S, D].

    Args:
        q, k, v: [..., S, D], and [..., N, D] of all keys.
        seen: bool [..., S, N]. A query that sees no key has output 0.
        bias: added to the logits; broadcastable to them.
        scale: factor of the logits; D ** -0.5 if None.
    """
    logits = torch.cat([q @ keys.mT for keys in k.split(RUN, -2)], -1) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if bias is not None:
        logits = logits + bias
    blind = ~seen.any(-1, keepdim=True)
    weights = logits.masked_fill(~(seen | blind), -torch.inf).softmax(-1).masked_fill(blind, 0)
    products = [part @ values for part, values in zip(weights.split(RUN, -1), v.split(RUN, -2), strict=True)]
    return torch.stack(products).sum(0)
