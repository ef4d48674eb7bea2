"""The router's custom op, which is opaque to `torch.compile`. An implementation is imported when the op runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_accel.kernels import impls
from dit_accel.kernels.router.call import RouterCall
from dit_accel.kernels.sla.call import Cuts


@torch.library.custom_op("dit_accel::route_blocks", mutates_args=())
def route_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    cuts: Sequence[int],
    counts: torch.Tensor | None,
    shares: torch.Tensor | None,
    forced: torch.Tensor | None,
    tau: float | None,
    exact: bool,
    cells: int,
    similarity: float | None,
    scale: float,
    width: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block lists [B, H, query blocks, width] and their counts [B, H, query blocks], int32; no gradient flows.

    Args:
        q, k: visual tokens in raster order, [B, H, visual, D].
        cuts: of queries and of keys, as `sla.call.Cuts.pack` returns them.
        counts, shares, forced, tau, exact, cells, similarity, scale, width: as in `RouterCall`.
        impl: the name of an implementation.
    """
    call = RouterCall(
        *Cuts.unpack(cuts), counts, shares, forced, tau, exact, cells, similarity, scale, width
    )  # fmt: skip
    return impls.named(impl, impls.ROUTER).load().route(q, k, call)


@route_blocks.register_fake
def _(q, k, cuts, counts, shares, forced, tau, exact, cells, similarity, scale, width, impl):
    rows = *q.shape[:2], Cuts.unpack(cuts).queries.blocks
    return q.new_empty((*rows, width), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)
