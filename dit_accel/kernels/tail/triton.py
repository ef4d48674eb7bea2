"""Launches of the tail's Triton kernels. Nothing waits for the device.

Memory beyond inputs and outputs: the pseudo-keys and their values, and one byte for each pair of a query block and a
key block. The backward also has fp32 gradients of the pseudo-keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs, Segments, cut_blocks
from dit_accel.kernels.block_sparse.triton import BlockSparseLaunches, run
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.obstacles import GROUP
from dit_accel.kernels.records import PseudoKeys
from dit_accel.kernels.tail.portable import spread
from dit_accel.kernels.tail.reference import TailedInputs
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
Cuts = Mapping[str, int]  # `impls.Implementation.cuts`


def forward(call: TailedInputs, cuts: Cuts) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.attention_with_tail`."""
    exact, pseudo = listed_part(call, cuts), TailLaunches(call, cuts).pseudo_keys()
    launches = BlockSparseLaunches(exact)
    out, lse = launches.empty_outputs(exact.q)
    share = lse.new_empty(lse.shape if call.share else 0)
    listed = launches.with_words(launches.ordered())
    tensors = out, *launches.heads(*exact[:3]), lse, share, listed, launches.samples, pseudo
    run(
        "forward", (launches.query_blocks, launches.batch * launches.heads_of_sample),
        (*tensors, launches.keys, launches.queries, exact.scale, launches.heads_of_sample),
        {**launches.dims(), **launches.blocks(), "HAS_SHARE": call.share}, exact.q.element_size(), JIT,
    )  # fmt: skip
    return out.transpose(1, 2), lse, share


def add_gradients(
    gradients: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
    call: TailedInputs, cuts: Cuts,
) -> None:  # fmt: skip
    """Add the tail's part to the listed keys' gradients of q [B, H, visual, D], k and v [B, H, N, D].

    Args:
        grad_out, grad_lse, out, lse: of the whole softmax.
    """
    grad_out, out = tuning.contiguous_rows(grad_out), tuning.contiguous_rows(out)
    launches = TailLaunches(call, cuts, grad_out, out)
    q, pseudo = launches.call.q, launches.pseudo_keys()
    dq, delta = launches.empty_rows(q), torch.empty_like(lse)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    launches.start(
        "dq", launches.query_blocks, (dq, *launches.heads(q, grad_out, out), grad_lse, lse, pseudo, delta)
    )  # fmt: skip
    sums = [torch.empty_like(x, dtype=torch.float32) for x in (pseudo.k, pseudo.v)]
    tensors = *sums, *launches.heads(q, grad_out), lse, delta, pseudo
    launches.start("dkdv", triton.cdiv(launches.key_blocks, GROUP), tensors)
    gradients[0].add_(dq.transpose(1, 2))
    held = valid_tokens(launches.key_order, q.device)[:, None]
    for gradient, of_blocks in zip(gradients[1:], sums, strict=True):
        visual_rows(gradient, call).add_(spread((of_blocks / held).to(q.dtype), launches.key_order))


def visual_rows(x: Tensor, call: TailedInputs) -> Tensor:
    """The visual tokens of keys, values or their gradients [B, H, N, D]: a view."""
    geometry = call.exact.geometry
    return x.narrow(2, geometry.usual[0], geometry.key_order.grid.visual)


def listed_part(call: TailedInputs, cuts: Cuts) -> BlockSparseInputs:
    """The call over the lists, with contiguous rows, in blocks that the kernels take."""
    q, k, v, lists, _, geometry, _ = call.exact
    lists, geometry = cut_blocks(lists, geometry, cuts)
    q, k, v = (tuning.contiguous_rows(x) for x in (q, k, v))
    return call.exact._replace(q=q, k=k, v=v, lists=lists, geometry=geometry)


class TailLaunches(BlockSparseLaunches):
    """The tail of a call: its visual tokens with contiguous rows, sizes and constants, and the map of blocks outside.

    Query blocks are cut as for the lists. Key blocks are whole, since each is one pseudo-key.
    """

    def __init__(self, call: TailedInputs, cuts: Cuts, *others: Tensor) -> None:
        exact, dropped = call.exact, call.dropped
        uncut = dataclasses.replace(exact.geometry, conditioning=0, text=0, text_first=False)
        lists, geometry = cut_blocks(exact.lists, uncut, {"block_q": cuts.get("block_q", uncut.block_q)})
        q, k, v = (tuning.contiguous_rows(x) for x in (exact.q, *(visual_rows(x, call) for x in exact[1:3])))
        self.call = BlockSparseInputs(q, k, v, lists, Segments(), geometry, exact.scale)
        super().__init__(self.call, *others)
        if dropped is not None and geometry != uncut:
            dropped = dropped[:, :, uncut.query_order.cut(geometry.block_q, q.device)[1]]
        shape = *q.shape[:2], self.query_blocks, self.key_blocks
        self.outside = torch.zeros(shape, dtype=torch.uint8, device=q.device) if dropped is None else dropped.byte()
        indices, counts = lists.indices.contiguous(), lists.counts.contiguous()
        marked = self.outside, indices, counts, indices.shape[-1], shape[3]
        tuning.launch(outside_kernel, (math.prod(shape[:3]), 1), marked, {}, (OUTSIDE,), ())

    def pseudo_keys(self) -> PseudoKeys:
        """Mean keys and mean values in the dtype of k, and the map."""
        k, v = self.call[1:3]
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
