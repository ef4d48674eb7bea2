"""Launches of the tail's Triton kernels. Nothing waits for the device.

Memory beyond inputs and outputs: the pseudo-keys and their values, and one byte for each pair of a query block and a
key block. The backward also has fp32 gradients of the pseudo-keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockSparseCall, Segments
from dit_accel.kernels.block_sparse.triton import TritonCall, run
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.obstacles import GROUP
from dit_accel.kernels.tail.call import TailCall
from dit_accel.kernels.tail.portable import spread
from dit_accel.kernels.tail.triton_kernels import (
    outside_kernel,
    pseudo_keys_kernel,
    tail_bwd_kernel_dkdv,
    tail_bwd_kernel_dq,
    tail_fwd_kernel,
)
from dit_accel.order import valid_tokens

JIT = {"forward": tail_fwd_kernel, "dq": tail_bwd_kernel_dq, "dkdv": tail_bwd_kernel_dkdv}
OUTSIDE = Launch(warps=1, stages=1, step=64)  # entries of a list that are marked at a time
MEANS = Launch(warps=4, stages=1, step=64)


def forward(call: TailCall) -> tuple[Tensor, Tensor]:
    """See `api.with_tail`."""
    launches = _TailLaunches(call)
    q, k, v, exact, exact_lse, *_ = launches.call
    out, lse = launches.room_for(exact), torch.empty_like(exact_lse, memory_format=torch.contiguous_format)
    tensors = q, exact, exact_lse.contiguous(), *launches.pseudo(k, v), *launches.logs_and_map, out, lse
    launches.start("forward", launches.query_blocks, tensors, (q, exact), (launches.key_blocks,))
    return out.transpose(1, 2), lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: TailCall
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.tail_backward`."""
    grad_out, out = tuning.contiguous_rows(grad_out), tuning.contiguous_rows(out)
    launches = _TailLaunches(call, grad_out, out)
    q, k, v, exact, exact_lse, *_ = launches.call
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    exact_lse = exact_lse.contiguous()
    dq, dexact = launches.room_for(q), launches.room_for(exact)
    dexact_lse, delta = lse.new_empty((2, *lse.shape))
    pseudo = *launches.pseudo(k, v), *launches.logs_and_map
    tensors = q, grad_out, out, exact, grad_lse, lse, exact_lse, *pseudo, dq, dexact, dexact_lse, delta
    launches.start("dq", launches.query_blocks, tensors, (q, grad_out, out, exact), (launches.key_blocks,))
    of_pseudo = [torch.empty_like(x, dtype=torch.float32) for x in pseudo[:2]]
    groups = triton.cdiv(launches.key_blocks, GROUP)
    tensors = q, grad_out, lse, delta, *pseudo, *of_pseudo
    launches.start("dkdv", groups, tensors, (q, grad_out), (launches.query_blocks, launches.key_blocks))
    held = valid_tokens(call.geometry.key_order, q.device)[:, None]
    dk, dv = (spread((x / held).to(q.dtype), call.geometry.key_order) for x in of_pseudo)
    return dq.transpose(1, 2), dk, dv, dexact.transpose(1, 2), dexact_lse.clone()


class _TailLaunches(TritonCall):
    """A call's sizes and constants, the call with contiguous rows, and the map of blocks outside the tail."""

    def __init__(self, call: TailCall, *others: Tensor) -> None:
        q, k, v, exact = (tuning.contiguous_rows(x) for x in call[:4])
        self.call = call._replace(q=q, k=k, v=v, exact=exact)
        super().__init__(BlockSparseCall(q, k, v, call.lists, Segments(), call.geometry, call.scale), exact, *others)
        self.heads, self.tokens = q.shape[1], q.shape[2]
        shape = *q.shape[:2], self.query_blocks, self.key_blocks
        dropped, (indices, counts, *_) = call.dropped, call.lists
        outside = torch.zeros(shape, dtype=torch.uint8, device=q.device) if dropped is None else dropped.byte()
        listed = outside, indices.contiguous(), counts.contiguous(), indices.shape[-1], shape[3]
        tuning.launch(outside_kernel, (math.prod(shape[:3]), 1), listed, {}, (OUTSIDE,), ())
        self.logs_and_map = valid_tokens(call.geometry.key_order, q.device).log(), outside

    def constants(self) -> dict[str, Any]:
        return {**tuning.head_dims(self.head_dim), "ALIGN": self.align}

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
