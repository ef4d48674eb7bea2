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
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs
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
from dit_accel.kernels.block_sparse.triton_words import partial_words_kernel
from dit_accel.kernels.cuts import contiguous_rows
from dit_accel.kernels.records import Heads, Lists, SampleSegments, SegmentRows, Side

JIT = {"forward": block_sparse_fwd_kernel, "dq": block_sparse_bwd_kernel_dq, "dkdv": block_sparse_bwd_kernel_dkdv}
INTERPRETED = isinstance(block_sparse_fwd_kernel, InterpretedFunction)
WORD_PROGRAMS = 16  # programs that share a list's partial blocks


def forward(call: BlockSparseInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE fp32 [B, H, Nq].

    A call like an earlier one of the same plan, which has opened its lists, repeats the earlier one's launches.
    """
    q, k, v, *_ = call
    key = plan_key(call)
    past = _PLAN_LAUNCHES.get(key)
    if past is not None:
        out, lse, lists, samples = past.prepare(call)
        of_q, of_k, of_v = past.others
        read = of_q._replace(start=q), of_k._replace(start=k), of_v._replace(start=v)
        with torch.cuda.device(q.device):
            past.forward.repeat(out, *read, lse, lists, samples)
        return out.transpose(1, 2), lse
    launches = BlockSparseLaunches(call)
    ordered, (out, lse) = launches.ordered(), launches.empty_outputs(q)
    heads = launches.heads(q, k, v)
    tensors = out, *heads, lse, launches.with_words(ordered), launches.samples
    launched = launches.launch("forward", launches.query_blocks, tensors)
    if launched is not None:
        others = [x._replace(start=None) for x in heads]
        launches.remember(_PLAN_LAUNCHES, key, launched.after(len(tensors)), others)
    return out.transpose(1, 2), lse


class PlanLaunches(NamedTuple):
    """The launches of a call of a static plan; no tensors.

    Args:
        forward, words: of both kernels, behind their tensors; `words` may be None.
        words_shape: of the words.
        samples: without its tensors.
        others: what else comes before the rest of the forward's arguments.
    """

    forward: tuning.PastLaunch
    words: tuning.PastLaunch | None
    words_shape: torch.Size
    samples: SampleSegments
    others: Any

    def prepare(self, call: BlockSparseInputs) -> tuple[torch.Tensor, torch.Tensor, Lists, SampleSegments]:
        """Output [B, N, H, D] and LSE [B, H, N] to be written; the lists with their words, and the segments."""
        q, _, _, lists, segments, _, _ = call
        entries, places, spans = lists.packed[0]
        width = places.shape[1]
        batch, heads, tokens, dim = q.shape
        out, lse = q.new_empty(batch, tokens, heads, dim), q.new_empty(batch, heads, tokens, dtype=torch.float32)
        words = spans.new_empty(self.words_shape, dtype=torch.int64)
        if self.words is not None:
            with torch.cuda.device(q.device):
                self.words.repeat(words, Lists(entries, spans, words, width, 1), lists.tables)
        tensors = SegmentRows(*[lists.counts if x is None else x for x in segments])
        return out, lse, Lists(places, spans, words, width, 0), self.samples._replace(tensors=tensors)


_PLAN_LAUNCHES: dict[Any, PlanLaunches] = {}
MOST_PLANS = 256


def plan_key(call: BlockSparseInputs) -> tuple[Any, ...] | None:
    """What the launches of a call depend on; None unless a plan has opened the lists for calls to come."""
    q, k, v, lists, segments, geometry, scale = call
    if not isinstance(lists.packed, tuple):
        return None
    key: tuple[Any, ...] = geometry, scale, q.device, q.dtype, lists.indices.shape, lists.tables is None
    for x in (q, k, v, *segments):
        key += (None,) if x is None else (x.shape, x.stride(), x.data_ptr() % 16)
    return key


def _lists(places: torch.Tensor, ordered: OrderedLists, words: torch.Tensor, per_head: int) -> Lists:
    return Lists(places, ordered.spans, words, places.shape[-1], per_head)


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, call: BlockSparseInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each [B, H, N, D] laid out in memory as [B, N, H, D]."""
    grad_out = contiguous_rows(grad_out)
    q, k, v, *_ = call
    launches = BlockSparseLaunches(call, grad_out, out)
    delta = torch.empty_like(lse)
    ordered, transposed = launches.both_ways()
    listed = launches.with_words(ordered)
    dq, dk, dv = (launches.empty_rows(x) for x in (q, k, v))
    statistics = lse if grad_lse is None else grad_lse.contiguous(), lse, delta
    tensors = dq, *launches.heads(q, k, v, grad_out, out), *statistics, listed, launches.samples
    launches.launch("dq", launches.query_blocks, tensors, HAS_GRAD_LSE=grad_lse is not None)
    visits = transposed.visits(listed)
    tensors = dk, dv, *launches.heads(q, k, v, grad_out), lse, delta, visits, launches.samples
    launches.launch("dkdv", launches.key_blocks, tensors)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class BlockSparseLaunches:
    """What the kernels of one call share: both sides, the segments of samples, and compile-time constants."""

    def __init__(self, call: BlockSparseInputs, *others: torch.Tensor) -> None:
        """`others`: further tensors [B, H, N, D] that the kernels read."""
        q, k, v, self.lists, segments, geometry, self.scale = call
        self.geometry = geometry
        self.query_order, self.key_order = geometry.orders
        self.query_blocks, self.key_blocks = self.query_order.blocks, self.key_order.blocks
        self.batch, self.heads_of_sample, self.query_tokens, self.head_dim = q.shape
        self.queries, self.keys = Side.of(self.query_order, self.query_tokens), Side.of(self.key_order, k.shape[2])
        self.samples = SampleSegments.of(segments, geometry, self.lists.counts)
        self.dtype = q.dtype
        self.words: tuning.PastLaunch | None = None
        self.words_shape = torch.Size([0])
        self.align = tuning.alignment(q, k, v, *others)

    def heads(self, *tensors: torch.Tensor) -> tuple[Heads, ...]:
        return tuple(Heads.of(x, self.align) for x in tensors)

    def ordered(self) -> OrderedLists:
        """The lists in the forward's order, after an assertion that `Geometry.partial_blocks` is large enough.

        Nothing waits for the device.
        """
        if self.lists.packed is not None:
            return split(self.lists, self.geometry)[0]
        if self.lists.tables is None:  # no partial block; nothing reads numbers of blocks
            places, spans = place_lists(self.lists.indices, self.lists.counts, self.geometry.key_order)
            return OrderedLists(*(x.flatten(0, -2) for x in (self.lists.indices, places, spans)))
        ordered, most = order_lists(self.lists, self.geometry), self.geometry.partial_blocks
        if most is not None:
            torch._assert_async(ordered.partial_blocks() <= most, f"more than partial_blocks={most} blocks are partial")
        return ordered

    def both_ways(self) -> tuple[OrderedLists, Transposed]:
        """The lists for the forward and dq kernels, and for dk and dv."""
        if self.lists.packed is not None:
            return split(self.lists, self.geometry)
        if self.lists.tables is not None:
            return both_ways(self.lists, self.geometry)
        return self.ordered(), transpose_lists(self.lists.indices, self.lists.counts, self.geometry)

    def with_words(self, ordered: OrderedLists) -> Lists:
        """The lists, and the words of their partial blocks (see `triton_tokens`).

        The size of the words follows from shapes or `Geometry.partial_blocks`, so nothing waits for the device.
        """
        geometry, per_head = self.geometry, int(self.lists.indices.ndim == 4)
        if self.lists.tables is None:
            words = ordered.spans.new_empty(0, dtype=torch.int64)  # no words are read
            return _lists(ordered.places, ordered, words, per_head)
        rows, width = ordered.entries.shape
        most = geometry.partial_blocks
        if most is None:
            visual_rows = rows // self.query_blocks * self.query_order.visual_blocks
            most = visual_rows * min(width, self.key_order.visual_blocks)
        words = ordered.spans.new_empty(most, triton.cdiv(geometry.block_k, 64), geometry.block_q, dtype=torch.int64)
        self.words_shape = words.shape
        if most:
            self.words = tuning.launch(
                partial_words_kernel, (rows, min(width, WORD_PROGRAMS)),
                (words, _lists(ordered.entries, ordered, words, 1), self.lists.tables, self.keys, self.queries),
                self.blocks(), (words_launch(geometry.block_q),), (),
            )  # fmt: skip
        return _lists(ordered.places, ordered, words, per_head)

    def remember(
        self,
        launches: dict[Any, PlanLaunches],
        key: tuple[Any, ...] | None,
        forward: tuning.PastLaunch,
        others: Any,
    ) -> None:
        """Keep a call's launches, if there are calls like it, and if kernels write every row of their results."""
        covered = self.query_tokens == self.query_order.grid.tokens == self.key_order.grid.tokens
        if key is None or not covered:
            return
        if len(launches) >= MOST_PLANS:
            launches.pop(next(iter(launches)))
        samples = self.samples._replace(tensors=None)
        words = self.words and self.words.after(3)
        launches[key] = PlanLaunches(forward, words, self.words_shape, samples, others)

    def empty_outputs(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, N, H, D] and LSE [B, H, N] for q, 0 and -inf in rows of no segment, which no kernel writes."""
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        return self.empty_rows(q), lse if q.shape[2] == self.query_order.grid.tokens else lse.fill_(-math.inf)

    def empty_rows(self, x: torch.Tensor) -> torch.Tensor:
        """An output for queries or keys x, [B, N, H, D], 0 in rows of no segment."""
        batch, heads, tokens, dim = x.shape
        order = self.query_order if self.geometry.own_queries else self.key_order
        return (x.new_empty if tokens == order.grid.tokens else x.new_zeros)(batch, tokens, heads, dim)

    def dims(self) -> dict[str, int]:
        return {**tuning.head_dims(self.head_dim), "ALIGN": self.align}

    def blocks(self) -> dict[str, Any]:
        """The constants for the blocks of both sides."""
        return {**tuning.block_sizes(self.query_order, "_Q"), **tuning.block_sizes(self.key_order, "_K")}

    def launch(self, kernel: str, blocks: int, tensors: tuple[Any, ...], **flags: bool) -> tuning.PastLaunch | None:
        """Launch a kernel with a program for each of `blocks` of every head."""
        constants = {
            **self.dims(),
            **self.blocks(),
            "HAS_TABLES": self.lists.tables is not None,
            **flags,
        }
        programs = blocks, self.batch * self.heads_of_sample
        arguments = *tensors, self.keys, self.queries, self.scale, self.heads_of_sample
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
