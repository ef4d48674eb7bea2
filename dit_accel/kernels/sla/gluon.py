"""Launch of the Gluon forward kernel, for compute capability 9.0; the backward is Triton's.

The emulator of the tests runs its source.
"""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.errors import DitAccelError
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.gluon import launches as engine
from dit_accel.kernels.block_sparse.triton import RASTER
from dit_accel.kernels.sla.gluon_forward import sparse_linear_gluon_fwd_kernel
from dit_accel.kernels.sla.triton import (
    FusedCall,
    listed_blocks,
    room_for_rows,
    room_for_saved,
    table_of_state,
)
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

LENGTHS_GIVEN = 2  # of what `triton_tokens.starts_of` may be given, the lengths of text alone


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, call: FusedCall, training: bool
) -> tuple[torch.Tensor, ...]:
    """As `triton.forward`, in scope "all".

    Raises:
        DitAccelError: the scale is not above 0.
    """
    if call.scale <= 0:
        raise DitAccelError(f"impl='gluon' takes a scale above 0, got {call.scale}; use impl='triton'.")
    batch, heads, _, dim = q.shape
    queries, keys = call.cuts
    segments = call.segments
    key_order = TokenOrder(
        TokenGrid(*keys.grid, text=segments.text, conditioning=segments.conditioning), keys.block, keys.tile
    )
    tile_q, tile_k = queries.tile or RASTER, keys.tile or RASTER
    half = engine.half_of(tile_q)
    sides = (q, queries.grid, half, engine.ROWS), *((x, keys.grid, tile_k, keys.block) for x in (k, v))
    descriptors, distances = zip(*(engine.describe(*side) for side in sides), strict=True)
    out = room_for_rows(q)
    exact, lse, *others = room_for_saved(q, call, training)
    written, _ = engine.describe(out.transpose(1, 2), queries.grid, half, engine.ROWS)
    exactly = engine.describe(exact.transpose(1, 2), queries.grid, half, engine.ROWS)[0] if training else written
    table, peaks, totals = table_of_state(call, q.dtype)
    bias = totals.new_zeros(dim) if bias is None else bias.float()
    sums = torch.cat([totals, bias.expand_as(totals), peaks[..., None]], dim=-1)
    rows = TensorDescriptor(
        table, [batch * heads * dim, dim], [dim, 1], [dim, dim], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    places, spans = listed_blocks(call)
    tuning.launch(
        sparse_linear_gluon_fwd_kernel, (queries.blocks, heads, batch),
        (
            lse, *(descriptor for pair in (*descriptors, written, exactly) for descriptor in pair), rows,
            sums, places, spans, places.new_empty(1, dtype=torch.int64), call.text_len,
            *(distance for three in distances for distance in three), call.scale * engine.LOG2E,
            *engine.sizes(key_order), *queries.order.tiles[1:], *segments[:3], LENGTHS_GIVEN,
            heads, queries.blocks, places.shape[-1], int(training),
        ),
        {**engine.constants(dim, keys.block, tile_q, tile_k), "MAP": call.feature_map},
        (engine.LAUNCH,), (),
    )  # fmt: skip
    return tuple(x.transpose(1, 2) if x.ndim == 4 else x for x in (out, exact, lse, *others))
