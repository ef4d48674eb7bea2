"""Launches of the tail's Triton kernels. Nothing waits for the device.

Memory beyond inputs and outputs: the pseudo-keys and their values, and one byte for each pair of a query block and a
key block. The backward also has fp32 gradients of the pseudo-keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import (
    BlockLists,
    BlockSparseInputs,
    Geometry,
    Segments,
    cut_blocks,
)
from dit_accel.kernels.block_sparse.triton import BlockSparseLaunches, run
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.cuts import contiguous_rows
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
    parts = parts_of(call, cuts)
    exact, pseudo = parts.listed, TailLaunches(parts).pseudo_keys()
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
    parts: Parts,
) -> None:  # fmt: skip
    """Add the tail's part to the listed keys' gradients of q [B, H, visual, D], k and v [B, H, N, D].

    Args:
        grad_out, grad_lse, out, lse: of the whole softmax.
    """
    grad_out, out = contiguous_rows(grad_out), contiguous_rows(out)
    launches = TailLaunches(parts, grad_out, out)
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
        visual_rows(gradient, parts.listed.geometry).add_(spread((of_blocks / held).to(q.dtype), launches.key_order))


class Parts(NamedTuple):
    """A call for the engine's kernels and for those of the tail. Both have the same query blocks.

    listed: the call over the lists, with contiguous rows, in blocks that the kernels take.
    lists, geometry: of visual tokens alone, for the tail. Key blocks are whole, since each is one pseudo-key. The lists
        may hold blocks behind the visual ones.
    dropped: as of `TailInputs`, for these query blocks.
    """

    listed: BlockSparseInputs
    lists: BlockLists
    geometry: Geometry
    dropped: Tensor | None


def parts_of(call: TailedInputs, cuts: Cuts) -> Parts:
    """Both parts of a call, cut once."""
    exact, dropped = call.exact, call.dropped
    q, k, v = (contiguous_rows(x) for x in exact[:3])
    block_q = {"block_q": cuts.get("block_q", exact.geometry.block_q)}
    lists, geometry = cut_blocks(exact.lists, exact.geometry, block_q)
    if dropped is not None and geometry != exact.geometry:
        dropped = dropped[:, :, exact.geometry.query_order.cut(geometry.block_q, q.device)[1]]
    visual = dataclasses.replace(geometry, conditioning=0, text=0, text_first=False)
    of_listed, smaller = cut_blocks(lists, geometry, cuts)
    listed = exact._replace(q=q, k=k, v=v, lists=of_listed, geometry=smaller)
    return Parts(listed, lists, visual, dropped)


def visual_rows(x: Tensor, geometry: Geometry) -> Tensor:
    """The visual tokens of keys, values or their gradients [B, H, N, D]: a view."""
    return x.narrow(2, geometry.usual[0], geometry.key_order.grid.visual)


class TailLaunches(BlockSparseLaunches):
    """The tail of a call: its visual tokens, sizes and constants, and the map of blocks outside."""

    def __init__(self, parts: Parts, *others: Tensor) -> None:
        (q, k, v, *_, scale), lists, geometry, dropped = parts
        k, v = (visual_rows(x, parts.listed.geometry) for x in (k, v))
        self.call = BlockSparseInputs(q, k, v, lists, Segments(), geometry, scale)
        super().__init__(self.call, *others)
        shape = *q.shape[:2], self.query_blocks, self.key_blocks
        self.outside = (
            torch.zeros(shape, dtype=torch.uint8, device=q.device)
            if dropped is None
            else dropped.to(torch.uint8, memory_format=torch.contiguous_format)
        )
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
        logs = valid_tokens(self.key_order, k.device).float().log()
        return PseudoKeys(mean_k, mean_v, logs, self.outside, self.key_blocks)

    def start(self, kernel: str, programs: int, tensors: tuple[Any, ...]) -> None:
        constants = {**self.dims(), **tuning.block_sizes(self.query_order, "_Q"), "BLOCK_K": GROUP}
        arguments = (*tensors, self.queries, self.scale, self.heads_of_sample)
        run(kernel, (programs, self.batch * self.heads_of_sample), arguments, constants, self.dtype.itemsize, JIT)
