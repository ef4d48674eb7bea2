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
from dit_accel.kernels.block_sparse.triton import BlockSparseLaunches, run
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.obstacles import GROUP
from dit_accel.kernels.tail.portable import spread
from dit_accel.kernels.tail.reference import TailCall
from dit_accel.kernels.tail.triton_kernels import (
    PseudoKeys,
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
    launches = TailLaunches(call)
    q, k, v, exact, exact_lse, *_ = launches.call
    out, lse = launches.empty_rows(exact), torch.empty_like(exact_lse, memory_format=torch.contiguous_format)
    tensors = out, *launches.heads(q, exact), exact_lse.contiguous(), launches.pseudo_keys(k, v), lse
    launches.start("forward", launches.query_blocks, tensors)
    return out.transpose(1, 2), lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: TailCall
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.tail_backward`."""
    grad_out, out = tuning.contiguous_rows(grad_out), tuning.contiguous_rows(out)
    launches = TailLaunches(call, grad_out, out)
    q, k, v, exact, exact_lse, *_ = launches.call
    statistics = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous(), lse, exact_lse.contiguous()
    dq, dexact = launches.empty_rows(q), launches.empty_rows(exact)
    dexact_lse, delta = lse.new_empty((2, *lse.shape))
    pseudo = launches.pseudo_keys(k, v)
    tensors = dq, *launches.heads(q, grad_out, out, exact), *statistics, pseudo, dexact, dexact_lse, delta
    launches.start("dq", launches.query_blocks, tensors)
    gradients = [torch.empty_like(x, dtype=torch.float32) for x in (pseudo.k, pseudo.v)]
    tensors = *gradients, *launches.heads(q, grad_out), lse, delta, pseudo
    launches.start("dkdv", triton.cdiv(launches.key_blocks, GROUP), tensors)
    held = valid_tokens(call.geometry.key_order, q.device)[:, None]
    dk, dv = (spread((x / held).to(q.dtype), call.geometry.key_order) for x in gradients)
    return dq.transpose(1, 2), dk, dv, dexact.transpose(1, 2), dexact_lse.clone()


class TailLaunches(BlockSparseLaunches):
    """A call's sizes and constants, the call with contiguous rows, and the map of blocks outside the tail."""

    def __init__(self, call: TailCall, *others: Tensor) -> None:
        q, k, v, exact = (tuning.contiguous_rows(x) for x in call[:4])
        self.call = call._replace(q=q, k=k, v=v, exact=exact)
        super().__init__(BlockSparseCall(q, k, v, call.lists, Segments(), call.geometry, call.scale), exact, *others)
        shape = *q.shape[:2], self.query_blocks, self.key_blocks
        dropped, (indices, counts, *_) = call.dropped, call.lists
        self.outside = torch.zeros(shape, dtype=torch.uint8, device=q.device) if dropped is None else dropped.byte()
        listed = self.outside, indices.contiguous(), counts.contiguous(), indices.shape[-1], shape[3]
        tuning.launch(outside_kernel, (math.prod(shape[:3]), 1), listed, {}, (OUTSIDE,), ())

    def pseudo_keys(self, k: Tensor, v: Tensor) -> PseudoKeys:
        """Mean keys and mean values [B, H, blocks, D] in the dtype of k."""
        mean_k, mean_v = (x.new_empty(*x.shape[:2], self.key_blocks, self.head_dim) for x in (k, v))
        arguments = (mean_k, mean_v, *self.heads(k, v), self.keys, self.heads_of_sample)
        constants = {**self.dims(), **tuning.block_sizes(self.key_order, "_K")}
        programs = self.key_blocks, self.batch * self.heads_of_sample
        tuning.launch(pseudo_keys_kernel, programs, arguments, constants, (MEANS,), ())
        logs = valid_tokens(self.key_order, k.device).log()
        return PseudoKeys(mean_k, mean_v, logs, self.outside, self.key_blocks)

    def start(self, kernel: str, programs: int, tensors: tuple[Any, ...]) -> None:
        constants = {**self.dims(), **tuning.block_sizes(self.query_order, "_Q"), "BLOCK_K": GROUP}
        arguments = (*tensors, self.queries, self.scale, self.heads_of_sample)
        run(kernel, (programs, self.batch * self.heads_of_sample), arguments, constants, self.dtype.itemsize, JIT)
