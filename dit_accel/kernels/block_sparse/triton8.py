"""Host side of `triton8`: forward alone, with queries and keys in 8 bits and fp16 sums of values.

Beyond what `triton` needs, a call has 8-bit keys and fp16 values, three bytes an element, and 8 bytes of sums a block
and channel. `verify="first-call"` of `accelerate` measures the error of a layer together with that of its method.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from dit_accel.errors import DitAccelError
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs
from dit_accel.kernels.block_sparse.triton import BlockSparseLaunches
from dit_accel.kernels.block_sparse.triton8_kernels import (
    block_sparse_8_fwd_kernel,
    key_value_scales_kernel,
    key_value_sums_kernel,
    quantise_kernel,
)
from dit_accel.kernels.block_sparse.triton_configs import QUANTISE, TUNED_BY, launches_8

LEAST_DIM = 32  # an 8-bit product sums at least so many channels


class Quantised(NamedTuple):
    """Keys and values as the kernel reads them; BLOCK_D is D padded with zeros to a power of two.

    k8: int8 [B H, Nk, BLOCK_D], keys less their mean, in steps of their block.
    v16: fp16 [B H, Nk, BLOCK_D], values times the factors of their channels.
    steps: fp32 [B H, Nk], at the row of a block's first token the size of its steps.
    scales: fp32 [B H, 3, BLOCK_D], the mean key, the factors of the values and their inverses.
    """

    k8: torch.Tensor
    v16: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor


def forward(call: BlockSparseInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE fp32 [B, H, Nq]."""
    shared = BlockSparseLaunches(call)
    quantised, (out, lse) = quantise(call, shared), shared.empty_outputs(call.q)
    constants = {**dims(shared), **shared.blocks(), "HAS_TABLES": shared.lists.tables is not None}
    tuning.launch(
        block_sparse_8_fwd_kernel, (shared.query_blocks, len(quantised.k8)),
        (
            out, *shared.heads(call.q), *quantised, lse, shared.with_words(shared.ordered()), shared.samples,
            shared.keys, shared.queries, shared.scale, shared.heads_of_sample,
        ),
        constants, launches_8(*(constants[name] for name in ("BLOCK_Q", "BLOCK_K", "BLOCK_D"))), TUNED_BY,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, call: BlockSparseInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """There is none.

    Raises:
        DitAccelError: always.
    """
    raise DitAccelError("impl='triton8' has no gradients: it rounds q and k to 8 bits. Use impl='auto' to train.")


def quantise(call: BlockSparseInputs, shared: BlockSparseLaunches) -> Quantised:
    """The keys and values of a call, in three launches. Nothing waits for the device."""
    _, k, v, *_ = call
    batch, heads, tokens, _ = k.shape
    constants = {**dims(shared), **tuning.block_sizes(shared.key_order, "_K")}
    block_d = constants["BLOCK_D"]
    sides = shared.samples, shared.keys, heads
    sums = k.new_empty(batch * heads, shared.key_blocks, 2, block_d, dtype=torch.float32)
    scales = k.new_empty(batch * heads, 3, block_d, dtype=torch.float32)
    programs, read = (shared.key_blocks, batch * heads), shared.heads(k, v)
    tuning.launch(key_value_sums_kernel, programs, (sums, *read, *sides), constants, (QUANTISE,), ())
    by_head = {"BLOCK_D": block_d}
    tuning.launch(key_value_scales_kernel, (batch * heads, 1), (scales, sums, *sides), by_head, (QUANTISE,), ())
    k8 = k.new_empty(batch * heads, tokens, block_d, dtype=torch.int8)
    v16 = k.new_empty(batch * heads, tokens, block_d, dtype=torch.float16)
    steps = k.new_empty(batch * heads, tokens, dtype=torch.float32)
    written = k8, v16, steps, *read, scales
    tuning.launch(quantise_kernel, programs, (*written, *sides), constants, (QUANTISE,), ())
    return Quantised(k8, v16, steps, scales)


def dims(shared: BlockSparseLaunches) -> dict[str, Any]:
    block_d = max(LEAST_DIM, triton.next_power_of_2(shared.head_dim))
    return {"D": shared.head_dim, "BLOCK_D": block_d, "ALIGN": shared.align}
