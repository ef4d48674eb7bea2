"""Launches of the tail's Triton kernels. Nothing waits for the device.

Memory beyond inputs and outputs: the pseudo-keys and their values, one byte for each pair of a query block and a key
block, and in the backward fp32 gradients of the pseudo-keys.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments
from dit_accel.kernels.block_sparse.triton import TritonCall, run
from dit_accel.kernels.tail.portable import spread
from dit_accel.kernels.tail.triton_configs import GROUP, MEANS, OUTSIDE
from dit_accel.kernels.tail.triton_kernels import (
    outside_kernel,
    pseudo_keys_kernel,
    tail_bwd_kernel_dkdv,
    tail_bwd_kernel_dq,
    tail_fwd_kernel,
)
from dit_accel.order import TokenOrder, valid_tokens

JIT = {"forward": tail_fwd_kernel, "dq": tail_bwd_kernel_dq, "dkdv": tail_bwd_kernel_dkdv}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    exact_lse: Tensor,
    lists: BlockLists,
    dropped: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `api.with_tail`."""
    q, k, v, exact = (_rows(x) for x in (q, k, v, exact))
    call = _TailCall(q, k, v, lists, dropped, geometry, scale, exact)
    out, lse = call.room_for(exact), torch.empty_like(exact_lse, memory_format=torch.contiguous_format)
    tensors = q, exact, exact_lse.contiguous(), *call.pseudo(k, v), *call.logs_and_map, out, lse
    call.start("forward", call.query_blocks, tensors, (q, exact), (call.key_blocks,))
    return out.transpose(1, 2), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    exact_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: BlockLists,
    dropped: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.tail_backward`."""
    q, k, v, exact, grad_out, out = (_rows(x) for x in (q, k, v, exact, grad_out, out))
    call = _TailCall(q, k, v, lists, dropped, geometry, scale, exact, grad_out, out)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    exact_lse = exact_lse.contiguous()
    dq, dexact, (dexact_lse, delta) = (
        call.room_for(q),
        call.room_for(exact),
        torch.empty((2, *lse.shape), dtype=lse.dtype, device=lse.device),
    )
    pseudo = *call.pseudo(k, v), *call.logs_and_map
    tensors = q, grad_out, out, exact, grad_lse, lse, exact_lse, *pseudo, dq, dexact, dexact_lse, delta
    call.start("dq", call.query_blocks, tensors, (q, grad_out, out, exact), (call.key_blocks,))
    of_pseudo = [torch.empty_like(x, dtype=torch.float32) for x in pseudo[:2]]
    groups = triton.cdiv(call.key_blocks, GROUP)
    tensors = q, grad_out, lse, delta, *pseudo, *of_pseudo
    call.start("dkdv", groups, tensors, (q, grad_out), (call.query_blocks, call.key_blocks))
    held = _sizes(geometry.key_order, q.device)[:, None]
    dk, dv = (spread((x / held).to(q.dtype), geometry.key_order) for x in of_pseudo)
    return dq.transpose(1, 2), dk, dv, dexact.transpose(1, 2), dexact_lse.clone()


class _TailCall(TritonCall):
    """A call's sizes and constants, and the map of blocks outside the tail."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: BlockLists,
        dropped: Tensor | None,
        geometry: Geometry,
        scale: float,
        *others: Tensor,
    ) -> None:
        super().__init__(q, k, v, lists, Segments(), geometry, scale, *others)
        self.heads, self.tokens = q.shape[1], q.shape[2]
        shape = *q.shape[:2], self.query_blocks, self.key_blocks
        outside = torch.zeros(shape, dtype=torch.uint8, device=q.device) if dropped is None else dropped.byte()
        listed = outside, lists.indices.contiguous(), lists.counts.contiguous(), lists.indices.shape[-1], shape[3]
        tuning.launch(outside_kernel, (math.prod(shape[:3]), 1), listed, {}, (OUTSIDE,), ())
        self.logs_and_map = _sizes(geometry.key_order, q.device).log(), outside

    def constants(self) -> dict[str, Any]:
        return {
            "D": self.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_dim)),
            "ALIGN": self.align,
        }

    def cut(self, side: str) -> dict[str, int]:
        """The constants for blocks of queries ("Q") or of keys ("K")."""
        return {name: size for name, size in self.fixed.blocks.items() if name.partition("_")[2].startswith(side)}

    def pseudo(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean keys and mean values [B, H, blocks, D] in the dtype of k."""
        keys, values = (x.new_empty(*x.shape[:2], self.key_blocks, self.head_dim) for x in (k, v))
        arguments = (k, v, keys, values, *self.strides(k, v), *self.geometry.grid, self.heads)
        constants = {**self.constants(), **self.cut("K")}
        tuning.launch(pseudo_keys_kernel, (self.key_blocks, self.programs), arguments, constants, (MEANS,), ())
        return keys, values

    def start(
        self,
        kernel: str,
        programs: int,
        tensors: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        sizes: tuple[int, ...],
    ) -> None:
        constants = {**self.constants(), **self.cut("Q"), "BLOCK_K": GROUP, "PRECISION": "ieee"}
        arguments = (
            *tensors, *self.strides(*strided), self.scale, *self.geometry.grid, self.heads, self.tokens, *sizes
        )  # fmt: skip
        run(kernel, (programs, self.programs), arguments, constants, self.dtype.itemsize, JIT)


@functools.lru_cache(maxsize=16)
def _sizes(order: TokenOrder, device: torch.device) -> Tensor:
    """Tokens of every key block, fp32 [blocks]; kept, so that a call copies nothing to the device."""
    return valid_tokens(order).to(device, torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows; models pass such tensors already."""
    return x if x.stride(-1) == 1 else x.contiguous()
