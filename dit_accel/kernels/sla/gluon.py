"""Launch of the Gluon forward kernel, for compute capability 9.0; the backward is Triton's.

The emulator of the tests runs its source.
"""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.errors import DitAccelError
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import Segments
from dit_accel.kernels.block_sparse.gluon import launches as engine
from dit_accel.kernels.block_sparse.gluon.copies import GluonProblem, TiledSide
from dit_accel.kernels.records import SampleSegments
from dit_accel.kernels.sla.arguments import results
from dit_accel.kernels.sla.gluon_forward import sparse_linear_gluon_fwd_kernel
from dit_accel.kernels.sla.triton import FusedArguments, critical_lists, table_of_state
from dit_accel.kernels.tuning import RASTER


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, call: FusedArguments, training: bool
) -> tuple[torch.Tensor, ...]:
    """As `triton.forward`, in scope "all".

    Raises:
        DitAccelError: the scale is not above 0.
    """
    if call.scale <= 0:
        raise DitAccelError(f"impl='gluon' takes a scale above 0, got {call.scale}; use impl='triton'.")
    batch, heads, _, dim = q.shape
    geometry, query_order, key_order = call.geometry, *call.geometry.orders
    tile_q, tile_k = query_order.tile or RASTER, key_order.tile or RASTER
    half = engine.half_of(tile_q)
    sides = (q, geometry.grid, half, engine.ROWS), *((x, geometry.grid, tile_k, geometry.block_k) for x in (k, v))
    descriptors, distances = zip(*(engine.describe(*side) for side in sides), strict=True)
    out, exact, lse, *others = results(q, call.critical, call.linear_scope, training)
    written, _ = engine.describe(out, geometry.grid, half, engine.ROWS)
    exactly = engine.describe(exact, geometry.grid, half, engine.ROWS)[0] if training else written
    table, peaks, totals = table_of_state(call, q.dtype)
    bias = totals.new_zeros(dim) if bias is None else bias.float()
    sums = torch.cat([totals, bias.expand_as(totals), peaks[..., None]], dim=-1)
    rows = TensorDescriptor(
        table, [batch * heads * dim, dim], [dim, 1], [dim, dim], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    # no query block lies behind the visual ones
    blocks = call.blocks[0]
    queries, keys = TiledSide.of(query_order)._replace(visual_blocks=blocks), TiledSide.of(key_order)
    samples = SampleSegments.of(Segments(text_len=call.text_len), geometry, call.text_len)
    problem = GluonProblem.of(critical_lists(call), samples, queries, keys, query_order, heads)
    problem = problem._replace(dense=0, list_rows=blocks, query_text=0, present=problem.present + 4 * training)
    programs, queue = engine.queue_of(blocks, batch * heads, q.device)
    tuning.launch(
        sparse_linear_gluon_fwd_kernel, programs,
        (
            lse, *(descriptor for pair in (*descriptors, written, exactly) for descriptor in pair), rows,
            sums, problem, queue, distances, call.scale * engine.LOG2E, q.shape[2],
        ),
        {**engine.constants(dim, geometry.block_k, tile_q, tile_k), "MAP": call.feature_map},
        engine.LAUNCHES, (),
    )  # fmt: skip
    return out, exact, lse, *others
