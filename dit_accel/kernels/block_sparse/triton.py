"""Host side of the Triton kernels: forward and backward over block lists, without copying q, k or v or waiting.

Memory beyond inputs and outputs: the lists, LSE and delta, and the bits of partial blocks, 1 KB each at 128x64. The
bits have room for `partial_blocks`, or for all entries of the lists. Each call computes them, and its backward computes
them again: all heads share them, and kept for the backward they would be stored once a layer.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from dit_accel.errors import DitAccelError
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments
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
    words_warps,
)
from dit_accel.kernels.block_sparse.triton_forward import block_sparse_fwd_kernel
from dit_accel.kernels.block_sparse.triton_lists import OrderedLists, both_ways, order_lists, split
from dit_accel.kernels.block_sparse.triton_tokens import partial_words_kernel

JIT = {"forward": block_sparse_fwd_kernel, "dq": block_sparse_bwd_kernel_dq, "dkdv": block_sparse_bwd_kernel_dkdv}
INTERPRETED = isinstance(block_sparse_fwd_kernel, InterpretedFunction)
WORD_PROGRAMS = 16  # programs that share a list's partial blocks
# Triton 3.10 changes the default. The fp32 softmax is more exact with a * b + c contracted.
FUSION = {} if INTERPRETED else {"enable_fp_fusion": True}


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: BlockLists,
    segments: Segments,
    geometry: Geometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE fp32 [B, H, Nq]."""
    call = TritonCall(q, k, v, lists.tables, segments, geometry, scale)
    if lists.packed is None:
        ordered = order_lists(lists, geometry)
        call.check_room(ordered)
    else:
        ordered, _ = split(lists, geometry)
    out = call.gradient_of(q)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
    call.launch(
        "forward", (call.query_blocks, call.programs), (q, k, v, out, lse, *call.masked(ordered), *call.segments),
        call.strides(q, k, v), (*call.sizes, q.shape[1], q.shape[2], call.query_blocks, lists.indices.shape[-1]),
        per_head=lists.indices.ndim == 4,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lists: BlockLists,
    segments: Segments,
    geometry: Geometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each [B, H, N, D] laid out in memory as [B, N, H, D]."""
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    call = TritonCall(q, k, v, lists.tables, segments, geometry, scale, grad_out, out)
    delta = torch.empty_like(lse)
    statistics = lse if grad_lse is None else grad_lse.contiguous(), lse, delta

    ordered, transposed = (both_ways if lists.packed is None else split)(lists, geometry)
    masked, per_head = call.masked(ordered), lists.indices.ndim == 4
    dq = call.gradient_of(q)
    call.launch(
        "dq", (call.query_blocks, call.programs),
        (q, k, v, grad_out, out, *statistics, dq, *masked, *call.segments), call.strides(q, k, v, grad_out, out),
        (*call.sizes, q.shape[1], q.shape[2], call.query_blocks, lists.indices.shape[-1]), per_head=per_head,
        HAS_GRAD_LSE=grad_lse is not None,
    )  # fmt: skip

    _, places, numbers, firsts = transposed
    numbers = places if numbers is None else numbers  # without tables no numbers are read
    dk, dv = call.gradient_of(k), call.gradient_of(v)
    call.launch(
        "dkdv", (call.key_blocks, call.programs),
        (q, k, v, grad_out, lse, delta, dk, dv, places, numbers, firsts, masked[-1], *call.segments),
        call.strides(q, k, v, grad_out),
        (*call.sizes, q.shape[1], q.shape[2], k.shape[2], call.key_blocks), per_head=per_head,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class TritonCall:
    """What the kernels of one call share: sizes, starts per sample, compile-time constants."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: torch.Tensor | None,
        segments: Segments,
        geometry: Geometry,
        scale: float,
        *others: torch.Tensor,
    ) -> None:
        """`others`: further tensors [B, H, N, D] that the kernels read."""
        self.geometry, self.scale = geometry, scale
        self.query_order, self.key_order = geometry.query_order, geometry.key_order
        self.query_blocks, self.key_blocks = self.query_order.blocks, self.key_order.blocks
        self.programs = q.shape[0] * q.shape[1]
        queries = self.query_order.grid
        self.sizes = (*geometry.grid, *geometry.query_grid, geometry.conditioning, queries.conditioning, queries.text)
        self.own_queries = int(geometry.own_queries)
        # The kernels do not write rows of no segment, nor gradients of text that is no key.
        self.covered = all(start is None for start in segments) or (
            segments.text_len is None and k.shape[2] == self.key_order.grid.tokens and q.shape[2] == queries.tokens
        )
        keys = self.key_order.grid
        usual = (0, keys.visual, keys.visual + keys.conditioning, keys.text)
        self.segments = tuple(
            start if start is not None else torch.full((q.shape[0],), default, dtype=torch.int32, device=q.device)
            for start, default in zip(segments, usual, strict=True)
        )
        self.tables = tables
        self.head_dim, self.dtype = q.shape[-1], q.dtype
        # In these units the compiler knows that rows are aligned, and loads 16 bytes at a time.
        unit = 16 // q.element_size()
        read = (q, k, v, *others)
        outer = [stride for x in read for stride in x.stride()[:3]]
        aligned = all(stride % unit == 0 for stride in outer) and all(x.data_ptr() % 16 == 0 for x in read)
        self.align = unit if aligned else 1

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        """Batch, head and row strides of each tensor in units of `align`."""
        return tuple(stride // self.align for x in tensors for stride in x.stride()[:3])

    def blocks(self) -> dict[str, int]:
        """The kernels' constants for block sizes and tiles."""
        geometry = self.geometry
        return {
            **dict(zip(("TILE_QT", "TILE_QH", "TILE_QW"), geometry.tile_q or (0, 0, 0), strict=True)),
            **dict(zip(("TILE_KT", "TILE_KH", "TILE_KW"), geometry.tile_k or (0, 0, 0), strict=True)),
            "BLOCK_Q": geometry.block_q,
            "BLOCK_K": geometry.block_k,
        }

    def check_room(self, lists: OrderedLists) -> None:
        """Assert that `Geometry.partial_blocks` is large enough, without waiting for the device."""
        room = self.geometry.partial_blocks
        if self.tables is not None and room is not None:
            torch._assert_async(lists.partial_blocks() <= room, f"more than partial_blocks={room} blocks are partial")

    def masked(self, lists: OrderedLists) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places and spans of the lists, and the bits of their partial blocks (see `triton_tokens`).

        The size of the bits follows from shapes or `Geometry.partial_blocks`, so nothing waits for the device.
        """
        geometry = self.geometry
        if self.tables is None:
            return lists.places, lists.spans, self.segments[0]  # no words are read
        rows, width = lists.entries.shape
        room = geometry.partial_blocks
        if room is None:
            visual_rows = rows // self.query_blocks * self.query_order.visual_blocks
            room = visual_rows * min(width, self.key_order.visual_blocks)
        words = lists.spans.new_empty(room, triton.cdiv(geometry.block_k, 64), geometry.block_q, dtype=torch.int64)
        if room:
            _start(
                partial_words_kernel, (rows, min(width, WORD_PROGRAMS)),
                words, lists.entries, lists.spans, self.tables, *geometry.grid, *geometry.query_grid,
                self.query_blocks, width, **self.blocks(), num_warps=words_warps(geometry.block_q),
            )  # fmt: skip
        return lists.places, lists.spans, words

    def gradient_of(self, x: torch.Tensor) -> torch.Tensor:
        """An output for x, [B, N, H, D], zero where no kernel writes."""
        batch, heads, tokens, dim = x.shape
        make = x.new_empty if self.covered else x.new_zeros
        return make(batch, tokens, heads, dim)

    def launch(
        self,
        kernel: str,
        programs: tuple[int, int],
        tensors: tuple[torch.Tensor, ...],
        strides: tuple[int, ...],
        sizes: tuple[int, ...],
        per_head: bool,
        **flags: bool,
    ) -> None:
        constants = {
            "D": self.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_dim)),
            "ALIGN": self.align,
            **self.blocks(),
            "HAS_TABLES": self.tables is not None,
            "PRECISION": "ieee",
            **flags,
        }
        arguments = (*tensors, *strides, self.scale, *sizes, int(per_head), self.own_queries)
        run(kernel, programs, arguments, constants, self.dtype.itemsize)


def run(
    kernel: str, programs: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any], itemsize: int
) -> None:
    """Launch a kernel: tuned on a device, with its first candidate under the interpreter.

    Raises:
        DitAccelError: no candidate fits the device's shared memory.
    """
    sizes = kernel, constants["BLOCK_Q"], constants["BLOCK_K"], constants["BLOCK_D"]
    if INTERPRETED:
        candidates: tuple[Launch, ...] = (next(launches(*sizes, 90)),)
    else:
        major, minor = torch.cuda.get_device_capability(arguments[0].device)
        candidates = tuple(fitting(*sizes, itemsize, 10 * major + minor))
        if not candidates:
            raise DitAccelError(
                f"The {kernel} kernel for blocks of {sizes[1]} x {sizes[2]} and head dimension {constants['D']} needs "
                f"more shared memory than compute capability {major}.{minor} has; plan smaller blocks, or use "
                "impl='portable'."
            )
    tuning.launch(JIT[kernel], programs, arguments, constants, candidates, TUNED_BY)


def _start(kernel: Any, programs: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel that is not tuned on the device of its first argument."""
    with contextlib.nullcontext() if INTERPRETED else torch.cuda.device(arguments[0].device):
        kernel[programs](*arguments, **constants, **FUSION)


assert set(JIT) == set(KERNELS)
