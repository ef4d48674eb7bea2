"""Block-sparse attention by PyTorch's FlexAttention, on every device that it supports.

FlexAttention cuts its sequences into runs of rows, so tokens are gathered unless they lie so already (`rows`). Its
kernels want blocks of at least 128 rows, so smaller ones are joined. A joined block is "full" for FlexAttention if all
its blocks are attended whole; otherwise each pair is looked up. The look-up finds the pair's block among the lists,
then, where the tables decide the block, one bit. Words are int64 [blocks, ceil(block_k / 64), block_q], bit s of
word w for key slot 64 w + s, as in `triton_tokens`.

PyTorch differentiates it, and a caller that `torch.compile` traces includes it. Outside such a caller each combination
of shapes, dtype, block sizes and scale is compiled once. On a CPU PyTorch 2.13 has neither gradients nor an LSE, and
cannot include it in a compiled caller; `impls` refuses these.

Source: Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
arXiv:2412.05496; `torch.nn.attention.flex_attention`.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry, Predicate
from dit_accel.kernels.block_sparse.libraries.rows import key_rows, put, query_rows, take
from dit_accel.order import TokenOrder

CHUNK_PAIRS = 1 << 24  # pairs whose bits are made at a time
WORD = 64  # slots of a word
JOINED = 128  # rows of FlexAttention's blocks
ABSENT, WHOLE = -1, -2
NO_LSE = ("cpu", "mps")


class Codes(NamedTuple):
    """Lists as a map, and the bits of the blocks that the tables decide.

    Attributes:
        blocks: int32 [..., q_blocks, k_blocks], `ABSENT`, `WHOLE` or the number of a block in `words`. The leading
            dimensions are [1, 1] for lists that heads share, else [B, H].
        words: int64; None if the tables decide no block.
    """

    blocks: torch.Tensor
    words: torch.Tensor | None


def forward(call: BlockSparseInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE [B, H, Nq]; None where there is none."""
    q, k, v, lists, segments, geometry, scale = call
    codes = read_codes(lists, geometry) if lists.packed is None else split(lists.packed, geometry)
    rows_k, valid = key_rows(geometry, segments, k)
    keys, values = take(k, rows_k), take(v, rows_k)
    rows_q = query_rows(geometry, segments, q)
    queries = take(q, rows_q)
    ragged = _ragged(geometry.key_order, q.device)
    mask = block_mask(codes, ragged, valid, (geometry.block_q, geometry.block_k), queries, keys)
    attend = _attend if torch.compiler.is_compiling() else _compiled(_key(queries, keys, codes, valid, geometry, scale))
    out, lse = attend(queries, keys, values, mask, scale)
    tokens = geometry.query_order.index(q.device) >= 0
    out = put(out, rows_q, tokens, q.shape[2])
    lse = None if lse is None else put(lse, rows_q, tokens, q.shape[2], -math.inf)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FlexAttention in the order of slots, and the LSE where it has one."""
    if q.device.type in NO_LSE:
        return flex_attention(q, k, v, block_mask=mask, scale=scale), None
    out, statistics = flex_attention(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, statistics.lse


def block_mask(
    codes: Codes,
    ragged: torch.Tensor,
    valid: torch.Tensor | None,
    sizes: tuple[int, int],
    q: torch.Tensor,
    k: torch.Tensor,
) -> BlockMask:
    """The lists for queries q and keys k in the order of slots.

    Args:
        ragged: bool [k_blocks], blocks with a slot that may be no key.
        valid: bool [B, slots], keys that are tokens; None: all.
        sizes: of a query block and a key block.
    """
    (block_q, block_k), (blocks, words) = sizes, codes
    shared = blocks.shape[0] == blocks.shape[1] == 1

    def allowed(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        sample, head = (b * 0, h * 0) if shared else (b, h)
        code = blocks[sample, head, query // block_q, key // block_k]
        seen = code != ABSENT
        if words is not None:
            slot = key % block_k
            word = words[code.clamp(min=0), slot // WORD, query % block_q]
            seen = (code == WHOLE) | ((code >= 0) & (((word >> (slot % WORD)) & 1) == 1))
        return seen if valid is None else seen & valid[b, key]

    joined = (max(1, JOINED // block_q), max(1, JOINED // block_k))
    listed, cut = _pool(blocks != ABSENT, joined), _pool((blocks != WHOLE) | ragged, joined)
    return BlockMask.from_kv_blocks(
        *_ordered(listed & cut), *_ordered(listed & ~cut), BLOCK_SIZE=(block_q * joined[0], block_k * joined[1]),
        mask_mod=allowed, seq_lengths=(q.shape[2], k.shape[2]),
    )  # fmt: skip


def _pool(blocks: torch.Tensor, joined: tuple[int, int]) -> torch.Tensor:
    """Whether any of the blocks that are joined is marked; blocks past the end are not."""
    rows, columns = joined
    padding = (0, -blocks.shape[-1] % columns, 0, -blocks.shape[-2] % rows)
    padded = nn.functional.pad(blocks.to(torch.int32), padding)
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1)) > 0


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A map as counts and lists, which have room for all blocks."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _key(
    q: torch.Tensor, k: torch.Tensor, codes: Codes, valid: torch.Tensor | None, geometry: Geometry, scale: float
) -> tuple[Any, ...]:
    """What a compiled function is specialised for."""
    shapes = tuple(None if x is None else tuple(x.shape) for x in (q, k, *codes, valid))
    sizes = (geometry.block_q, geometry.block_k)
    return shapes, q.stride(), k.stride(), q.dtype, q.device, sizes, scale, torch.is_grad_enabled(), q.requires_grad


@functools.lru_cache(maxsize=256)
def _compiled(key: tuple[Any, ...]) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """`_attend`, compiled for one key. Dynamo counts compilations by code object and gives up beyond eight."""
    code = _attend.__code__.replace(co_name=f"flex_attend_{abs(hash(key))}")
    return torch.compile(types.FunctionType(code, _attend.__globals__), dynamic=False, fullgraph=True)


def read_codes(lists: BlockLists, geometry: Geometry) -> Codes:
    """Waits for the device if there are tables."""
    query, key, used = geometry.query_order, geometry.key_order, lists.used

    def as_map(entries: torch.Tensor) -> torch.Tensor:
        marked = lists.map(entries, key.blocks)
        return marked if marked.ndim == 4 else marked[None, None]

    codes = torch.where(as_map(used), WHOLE, ABSENT).to(torch.int32)
    if lists.tables is None:
        return Codes(codes, None)
    decided = as_map(used if lists.partial is None else used & lists.partial)
    decided[..., query.visual_blocks :, :] = False
    decided[..., key.visual_blocks :] = False
    numbers = decided.flatten().cumsum(0, dtype=torch.int32).view_as(codes) - 1
    return Codes(torch.where(decided, numbers, codes), _words(decided, lists.tables, geometry))


def pack(lists: BlockLists, geometry: Geometry) -> torch.Tensor:
    """`read_codes` of lists that heads share, in one tensor: int32 [words]."""
    blocks, words = read_codes(lists, geometry)
    return torch.cat([blocks.flatten(), *([] if words is None else [words.view(torch.int32).flatten()])])


def split(packed: torch.Tensor, geometry: Geometry) -> Codes:
    """The inverse of `pack`."""
    shape = 1, 1, geometry.query_order.blocks, geometry.key_order.blocks
    blocks, words = packed[: math.prod(shape)].view(shape), packed[math.prod(shape) :]
    if not len(words):
        return Codes(blocks, None)
    width = -(-geometry.block_k // WORD)
    return Codes(blocks, words.clone().view(torch.int64).view(-1, width, geometry.block_q))


def _ragged(order: TokenOrder, device: torch.device) -> torch.Tensor:
    """Blocks with a slot that may be no key: bool [blocks]. Text blocks always may, for text lengths vary."""
    ragged = (order.index(device).view(-1, order.block) < 0).any(1)
    ragged[order.blocks - order.text_blocks :] = True
    return ragged


def _words(decided: torch.Tensor, tables: torch.Tensor, geometry: Geometry) -> torch.Tensor | None:
    """The bits of the decided blocks, in the order of their numbers."""
    _, _, rows, columns = decided.nonzero(as_tuple=True)
    if not len(rows):
        return None
    device, block_q, block_k = tables.device, geometry.block_q, geometry.block_k
    slots_q = geometry.query_order.index(device).view(-1, block_q)
    slots_k = geometry.key_order.index(device).view(-1, block_k)
    predicate = Predicate(tables, geometry.query_grid, geometry.grid)
    width = -(-block_k // WORD)
    shifts = torch.arange(WORD, device=device)
    parts = []
    step = max(1, CHUNK_PAIRS // (block_q * block_k))
    for some_q, some_k in zip(rows.split(step), columns.split(step), strict=True):
        q, k = slots_q[some_q], slots_k[some_k]
        pairs = predicate.allowed(q.clamp(min=0), k.clamp(min=0)) & (k >= 0)[:, None]
        pairs = nn.functional.pad(pairs, (0, width * WORD - block_k)).unflatten(-1, (width, WORD))
        parts.append((pairs.long() << shifts).sum(-1).transpose(1, 2))
    return torch.cat(parts)
