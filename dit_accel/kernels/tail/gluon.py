"""Launches of the Gluon kernel of attention with the tail; everything beside its forward is Triton's."""

from __future__ import annotations

from torch import Tensor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.gluon import launches as engine
from dit_accel.kernels.block_sparse.gluon.copies import KEYS
from dit_accel.kernels.tail.gluon_forward import tail_gluon_fwd_kernel
from dit_accel.kernels.tail.reference import TailedInputs
from dit_accel.kernels.tail.triton import Cuts, TailLaunches, add_gradients, parts_of
from dit_accel.kernels.tuning import RASTER

__all__ = ["add_gradients", "forward", "parts_of"]


def forward(call: TailedInputs, cuts: Cuts) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.attention_with_tail`."""
    parts = parts_of(call, cuts)
    exact, pseudo = parts.listed, TailLaunches(parts).pseudo_keys()
    launches = engine.GluonLaunches(exact)
    out, lse = launches.empty_outputs(exact.q)
    share = lse.new_empty(lse.shape if call.share else 0)
    q, scale = engine.with_positive_scale(exact.q, exact.scale)
    pairs, distances = launches.described(q, *exact[1:3], out)
    pooled = (engine.describe(x, (1, 1, 1), RASTER, KEYS.value)[0][1] for x in (pseudo.k, pseudo.v))
    programs, queue = launches.in_turn(launches.query_blocks)
    tuning.launch(
        tail_gluon_fwd_kernel, programs,
        (
            lse, share, *(descriptor for pair in pairs for descriptor in pair), *pooled, pseudo,
            launches.problem(launches.with_words(launches.ordered())), queue, distances, scale * engine.LOG2E,
            launches.query_tokens,
        ),
        {**launches.constants(), "SHARE": call.share}, engine.LAUNCHES, (),
    )  # fmt: skip
    return out.transpose(1, 2), lse, share
