"""Block-sparse attention by cuDNN's own kernels for Hopper, over lists of whole blocks.

The kernels have no masks of tokens, so lists with tables are refused. They take runs of rows, and of each key block
its first keys only. Tokens are therefore gathered (`rows`) with the valid keys of a block first. Their order within a
block changes a result by rounding alone. A key block without a valid key leaves the lists.

Source: `cudnn.BSA` of nvidia-cudnn-frontend 1.32 (experimental) and its page "Block Sparse Attention". It takes int32
lists [B, H, query blocks, width] with counts, and the number of valid keys of each block. No GPU has run it here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs
from dit_accel.kernels.block_sparse.libraries import rows


class Gathered(NamedTuple):
    """Where both sides' slots lie in memory, and the library's arguments for the lists.

    Attributes:
        rows_q, rows_k: int64 [B, slots]; None if rows are slots.
        valid_q: bool [slots], slots that are queries.
        valid_k: bool [B, slots], slots that are keys; None without `rows_k`.
        arguments: of both of the library's functions.
    """

    rows_q: torch.Tensor | None
    rows_k: torch.Tensor | None
    valid_q: torch.Tensor
    valid_k: torch.Tensor | None
    arguments: dict[str, Any]


def forward(call: BlockSparseInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE [B, H, Nq] in fp32."""
    from cudnn import BSA

    gathered, tokens = gather(call), call.q.shape[2]
    q, k, v = rows.take(call.q, gathered.rows_q), *(rows.take(x, gathered.rows_k) for x in (call.k, call.v))
    out, lse = BSA.block_sparse_attention_forward(q, k, v, **gathered.arguments, allow_empty_block_nums=True)
    lse = rows.put(lse, gathered.rows_q, gathered.valid_q, tokens, -math.inf)
    return _in_memory(rows.put(out, gathered.rows_q, gathered.valid_q, tokens)), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: BlockSparseInputs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v [B, H, N, D], laid out in memory as [B, N, H, D].

    Raises:
        DitAccelError: a gradient comes through the LSE, for which the library has no argument.
    """
    from cudnn import BSA

    if grad_lse is not None:
        raise DitAccelError("impl='cudnn' has no gradient through the log-sum-exp. Use impl='triton'.")
    gathered = gather(call)
    q, out, lse, grad_out = (rows.take(x, gathered.rows_q) for x in (call.q, out, lse, grad_out))
    k, v = (rows.take(x, gathered.rows_k) for x in (call.k, call.v))
    # A padding slot repeats a query. Without a gradient of its own it adds nothing to those of the keys.
    grad_out = grad_out.masked_fill(~gathered.valid_q[:, None], 0.0)
    dq, dk, dv = BSA.block_sparse_attention_backward(grad_out, q, k, v, out, lse, **gathered.arguments)
    dq = rows.put(dq, gathered.rows_q, gathered.valid_q, call.q.shape[2])
    dk, dv = (rows.put(x, gathered.rows_k, gathered.valid_k, call.k.shape[2]) for x in (dk, dv))
    return _in_memory(dq), _in_memory(dk), _in_memory(dv)


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D], laid out as [B, N, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def gather(call: BlockSparseInputs) -> Gathered:
    """How the tokens and lists of a call reach the library.

    Raises:
        DitAccelError: tables decide blocks token by token.
    """
    lists, geometry, segments = call.lists, call.geometry, call.segments
    if lists.tables is not None:
        raise DitAccelError(
            "impl='cudnn' attends whole blocks, and this mask cuts some. Use impl='auto', or a mask of whole tiles."
        )
    batch, heads, block, device = *call.k.shape[:2], geometry.block_k, call.q.device
    rows_q = rows.query_rows(geometry, segments, call.q, whole=True)
    rows_k, valid_k = rows.key_rows(geometry, segments, call.k, whole=True)
    if rows_k is None or valid_k is None:
        sizes = torch.full((batch, geometry.key_order.blocks), block, dtype=torch.int32, device=device)
    else:
        by_block = valid_k.unflatten(1, (-1, block))
        sizes, first = by_block.sum(-1, dtype=torch.int32), _first(by_block)
        rows_k = rows_k.view_as(by_block).gather(-1, first).flatten(1)
        valid_k = by_block.gather(-1, first).flatten(1)
    shape = batch, heads, *lists.indices.shape[-2:]
    indices, used = lists.indices.expand(shape), lists.used.expand(shape)
    named = torch.where(used, indices, 0).long()  # entries that do not count may hold anything
    nonempty = used & (sizes[:, None, None].expand(*shape[:3], -1).gather(-1, named) > 0)
    arguments = {
        "q2k_block_index": named.gather(-1, _first(nonempty)).int(),
        "q2k_block_nums": nonempty.sum(-1, dtype=torch.int32),
        "block_sizes": sizes,
        "sparse_block_size": block,
        "softmax_scale": call.scale,
    }
    return Gathered(rows_q, rows_k, geometry.query_order.index(device) >= 0, valid_k, arguments)


def _first(marked: torch.Tensor) -> torch.Tensor:
    """The order that puts marked entries of the last axis first, and changes nothing else."""
    return marked.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
