"""Host side of the Triton kernels: forward and backward over block lists, without copying q, k or v or waiting.

Memory beyond inputs and outputs: the lists, LSE and delta, and the bits of partial blocks, 1 KB each at 128x64. The
bits have room for `partial_blocks`, or for all entries of the lists. Each call computes them, and its backward computes
them again: all heads share them, and kept for the backward they would be stored once a layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from dit_accel.errors import DitAccelError
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockSparseCall, Geometry
from dit_accel.kernels.block_sparse.triton_backward import (
    block_sparse_bwd_kernel_dkdv,
    block_sparse_bwd_kernel_dq,
)
from dit_accel.kernels.block_sparse.triton_configs import (
    KERNELS,
    TUNED_BY,
    Launch,
    fitting,
    launches,
    words_launch,
)
from dit_accel.kernels.block_sparse.triton_forward import block_sparse_fwd_kernel
from dit_accel.kernels.block_sparse.triton_lists import (
    OrderedLists,
    Transposed,
    both_ways,
    order_lists,
    split,
    transpose_lists,
)
from dit_accel.kernels.block_sparse.triton_places import place_lists
from dit_accel.kernels.block_sparse.triton_tokens import partial_words_kernel

JIT = {"forward": block_sparse_fwd_kernel, "dq": block_sparse_bwd_kernel_dq, "dkdv": block_sparse_bwd_kernel_dkdv}
INTERPRETED = isinstance(block_sparse_fwd_kernel, InterpretedFunction)
RASTER = (0, 0, 0)  # the tile of raster order
WORD_PROGRAMS = 16  # programs that share a list's partial blocks


def forward(call: BlockSparseCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE fp32 [B, H, Nq].

    A call like an earlier one of the same plan, which has opened its lists, repeats the earlier one's launches.
    """
    q, k, v, lists, *_ = call
    like = likeness(call)
    kept = _KEPT.get(like)
    if kept is not None:
        out, lse, behind = kept.start(call)
        with torch.cuda.device(q.device):
            kept.forward.again(q, k, v, out, lse, *behind)
        return out.transpose(1, 2), lse
    host = TritonCall(call)
    ordered, (out, lse) = host.ordered(), host.room(q)
    tensors = q, k, v, out, lse, *host.masked(ordered), *host.segments[:4]
    launched = host.launch(
        "forward", (host.query_blocks, host.programs), tensors, (*host.segments[4:], *host.strides(q, k, v)),
        (*host.sizes, q.shape[1], q.shape[2], host.query_blocks, lists.indices.shape[-1]),
        per_head=lists.indices.ndim == 4,
    )  # fmt: skip
    if launched is not None:
        host.keep(_KEPT, like, launched.behind(len(tensors)))
    return out.transpose(1, 2), lse


class Kept(NamedTuple):
    """The launches of a call of a static plan; no tensors.

    Args:
        forward, words: of both kernels, behind their tensors; `words` may be None.
        room: shape of the words.
        others: what the implementation needs besides.
    """

    forward: tuning.PastLaunch
    words: tuning.PastLaunch | None
    room: torch.Size
    others: Any = None

    def start(self, call: BlockSparseCall) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Output [B, N, H, D] and LSE [B, H, N] to be written; and places, spans, words and starts, made ready."""
        q, _, _, lists, segments, *_ = call
        entries, places, spans = lists.packed[0]
        batch, heads, tokens, dim = q.shape
        out, lse = q.new_empty(batch, tokens, heads, dim), q.new_empty(batch, heads, tokens, dtype=torch.float32)
        words = spans.new_empty(self.room, dtype=torch.int64)
        if self.words is not None:
            with torch.cuda.device(q.device):
                self.words.again(words, entries, spans, lists.tables)
        return out, lse, (places, spans, words, *(lists.counts if start is None else start for start in segments))


_KEPT: dict[Any, Kept] = {}
MOST_KEPT = 256


def likeness(call: BlockSparseCall) -> tuple[Any, ...] | None:
    """What the launches of a call depend on; None unless a plan has opened the lists for calls to come."""
    q, k, v, lists, segments, geometry, scale = call
    if not isinstance(lists.packed, tuple):
        return None
    like: tuple[Any, ...] = geometry, scale, q.device, q.dtype, lists.indices.shape, lists.tables is None
    for x in (q, k, v, *segments):
        like += (None,) if x is None else (x.shape, x.stride(), x.data_ptr() % 16)
    return like


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, call: BlockSparseCall
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each [B, H, N, D] laid out in memory as [B, N, H, D]."""
    grad_out = tuning.contiguous_rows(grad_out)
    q, k, v, lists, *_ = call
    host = TritonCall(call, grad_out, out)
    delta = torch.empty_like(lse)
    statistics = lse if grad_lse is None else grad_lse.contiguous(), lse, delta

    ordered, transposed = host.both_ways()
    masked, per_head = host.masked(ordered), lists.indices.ndim == 4
    dq = host.room_for(q)
    host.launch(
        "dq", (host.query_blocks, host.programs),
        (q, k, v, grad_out, out, *statistics, dq, *masked, *host.segments), host.strides(q, k, v, grad_out, out),
        (*host.sizes, q.shape[1], q.shape[2], host.query_blocks, lists.indices.shape[-1]), per_head=per_head,
        HAS_GRAD_LSE=grad_lse is not None,
    )  # fmt: skip

    _, places, numbers, firsts = transposed
    numbers = places if numbers is None else numbers  # without tables no numbers are read
    dk, dv = host.room_for(k), host.room_for(v)
    host.launch(
        "dkdv", (host.key_blocks, host.programs),
        (q, k, v, grad_out, lse, delta, dk, dv, places, numbers, firsts, masked[-1], *host.segments),
        host.strides(q, k, v, grad_out),
        (*host.sizes, q.shape[1], q.shape[2], k.shape[2], host.key_blocks), per_head=per_head,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Fixed(NamedTuple):
    """What the launches of a geometry share."""

    query_blocks: int
    key_blocks: int
    query_tokens: int
    key_tokens: int
    sizes: tuple[int, ...]
    blocks: dict[str, int]

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, geometry: Geometry) -> Fixed:
        query_order, key_order = geometry.query_order, geometry.key_order
        queries = query_order.grid
        tiles = zip(
            ("TILE_QT", "TILE_QH", "TILE_QW", "TILE_KT", "TILE_KH", "TILE_KW"),
            (*(geometry.tile_q or RASTER), *(geometry.tile_k or RASTER)),
            strict=True,
        )
        return cls(
            query_order.blocks,
            key_order.blocks,
            queries.tokens,
            key_order.grid.tokens,
            (*geometry.grid, *geometry.query_grid, geometry.conditioning, queries.conditioning, queries.text),
            {**dict(tiles), "BLOCK_Q": geometry.block_q, "BLOCK_K": geometry.block_k},
        )


class TritonCall:
    """What the kernels of one call share: sizes, starts per sample, compile-time constants."""

    def __init__(self, call: BlockSparseCall, *others: torch.Tensor) -> None:
        """`others`: further tensors [B, H, N, D] that the kernels read."""
        q, k, v, lists, segments, geometry, scale = call
        self.lists, self.geometry, self.scale = lists, geometry, scale
        self.fixed = Fixed.of(geometry)
        self.query_blocks, self.key_blocks, *_ = self.fixed
        self.programs = q.shape[0] * q.shape[1]
        self.sizes = self.fixed.sizes
        self.own_queries = int(geometry.own_queries)
        given = (segments.visual_start is not None) + 2 * (segments.text_len is not None)
        starts = (lists.counts if start is None else start for start in segments)  # what is not given is not read
        self.segments: tuple[Any, ...] = (*starts, *geometry.usual, given)
        self.head_dim, self.dtype = q.shape[-1], q.dtype
        self.queries = q.shape[2]
        self.words: tuning.PastLaunch | None = None
        self.words_room = torch.Size([0])
        # In these units the compiler knows that rows are aligned, and loads 16 bytes at a time.
        self.align = tuning.alignment(q, k, v, *others)

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        """Batch, head and row strides of each tensor in units of `align`."""
        return tuple(stride // self.align for x in tensors for stride in x.stride()[:3])

    def ordered(self) -> OrderedLists:
        """The lists in the forward's order, after an assertion that `Geometry.partial_blocks` is large enough.

        Nothing waits for the device.
        """
        if self.lists.packed is not None:
            return split(self.lists, self.geometry)[0]
        if self.lists.tables is None:  # no partial block; nothing reads numbers of blocks
            places, spans = place_lists(self.lists.indices, self.lists.counts, self.geometry.key_order)
            return OrderedLists(*(x.flatten(0, -2) for x in (self.lists.indices, places, spans)))
        ordered, room = order_lists(self.lists, self.geometry), self.geometry.partial_blocks
        if room is not None:
            torch._assert_async(ordered.partial_blocks() <= room, f"more than partial_blocks={room} blocks are partial")
        return ordered

    def both_ways(self) -> tuple[OrderedLists, Transposed]:
        """The lists for the forward and dq kernels, and for dk and dv."""
        if self.lists.packed is not None:
            return split(self.lists, self.geometry)
        if self.lists.tables is not None:
            return both_ways(self.lists, self.geometry)
        return self.ordered(), transpose_lists(self.lists.indices, self.lists.counts, self.geometry)

    def masked(self, lists: OrderedLists) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places and spans of the lists, and the bits of their partial blocks (see `triton_tokens`).

        The size of the bits follows from shapes or `Geometry.partial_blocks`, so nothing waits for the device.
        """
        geometry = self.geometry
        if self.lists.tables is None:
            return lists.places, lists.spans, lists.spans.new_empty(0, dtype=torch.int64)  # no words are read
        rows, width = lists.entries.shape
        room = geometry.partial_blocks
        if room is None:
            visual_rows = rows // self.query_blocks * geometry.query_order.visual_blocks
            room = visual_rows * min(width, geometry.key_order.visual_blocks)
        words = lists.spans.new_empty(room, triton.cdiv(geometry.block_k, 64), geometry.block_q, dtype=torch.int64)
        self.words_room = words.shape
        if room:
            self.words = tuning.launch(
                partial_words_kernel, (rows, min(width, WORD_PROGRAMS)),
                (words, lists.entries, lists.spans, self.lists.tables, *self.sizes[:6], self.query_blocks, width),
                self.fixed.blocks, (words_launch(geometry.block_q),), (),
            )  # fmt: skip
        return lists.places, lists.spans, words

    def keep(
        self, kept: dict[Any, Kept], like: tuple[Any, ...] | None, forward: tuning.PastLaunch, others: Any = None
    ) -> None:
        """Keep a call's launches, if there are calls like it, and if kernels write every row of their results."""
        covered = self.queries == self.fixed.query_tokens == self.fixed.key_tokens
        if like is None or not covered:
            return
        if len(kept) >= MOST_KEPT:
            kept.pop(next(iter(kept)))
        kept[like] = Kept(forward, self.words and self.words.behind(4), self.words_room, others)

    def room(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, N, H, D] and LSE [B, H, N] for q, 0 and -inf in rows of no segment, which no kernel writes."""
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        return self.room_for(q), lse if q.shape[2] == self.fixed.query_tokens else lse.fill_(-math.inf)

    def room_for(self, x: torch.Tensor) -> torch.Tensor:
        """An output for queries or keys x, [B, N, H, D], 0 in rows of no segment."""
        batch, heads, tokens, dim = x.shape
        covered = tokens == (self.fixed.query_tokens if self.geometry.own_queries else self.fixed.key_tokens)
        return (x.new_empty if covered else x.new_zeros)(batch, tokens, heads, dim)

    def launch(
        self,
        kernel: str,
        programs: tuple[int, int],
        tensors: tuple[torch.Tensor, ...],
        strides: tuple[int, ...],
        sizes: tuple[int, ...],
        per_head: bool,
        **flags: bool,
    ) -> tuning.PastLaunch | None:
        constants = {
            **tuning.head_dims(self.head_dim),
            "ALIGN": self.align,
            **self.fixed.blocks,
            "HAS_TABLES": self.lists.tables is not None,
            "PRECISION": "ieee",
            **flags,
        }
        arguments = (*tensors, *strides, self.scale, *sizes, int(per_head), self.own_queries)
        return run(kernel, programs, arguments, constants, self.dtype.itemsize)


def run(
    kernel: str,
    programs: tuple[int, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    itemsize: int,
    functions: Mapping[str, Any] = JIT,
) -> tuning.PastLaunch | None:
    """Launch a kernel: tuned on a device, with its first candidate under the interpreter.

    Args:
        functions: the jitted functions by the kernel's names; all have the same launches.

    Raises:
        DitAccelError: no candidate fits the device's shared memory.
    """
    sizes = kernel, constants["BLOCK_Q"], constants["BLOCK_K"], constants["BLOCK_D"]
    if INTERPRETED:
        candidates: tuple[Launch, ...] = (next(launches(*sizes, 90)),)
    else:
        candidates = _candidates(*sizes, itemsize, arguments[0].device)
        if not candidates:
            raise DitAccelError(
                f"The {kernel} kernel for blocks of {sizes[1]} x {sizes[2]} and head dimension {constants['D']} needs "
                f"more shared memory than {torch.cuda.get_device_name(arguments[0].device)} has; plan smaller blocks, "
                "or use impl='portable'."
            )
    return tuning.launch(functions[kernel], programs, arguments, constants, candidates, TUNED_BY)


@functools.cache
def _candidates(
    kernel: str, block_q: int, block_k: int, block_d: int, itemsize: int, device: torch.device
) -> tuple[Launch, ...]:
    major, minor = torch.cuda.get_device_capability(device)
    return tuple(fitting(kernel, block_q, block_k, block_d, itemsize, 10 * major + minor))


assert set(JIT) == set(KERNELS)
