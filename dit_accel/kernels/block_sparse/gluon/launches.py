"""The Gluon implementation, for compute capability 9.0: a forward kernel, and two for the gradients.

They read the same lists and the same bits of partial blocks as Triton's, and the backward reads the forward's LSE, so
that a call's forward and backward may be of different implementations. Query blocks have 128 tokens and key blocks 64
or 128, in raster order or in tiles of any shape.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs, Shape
from dit_accel.kernels.block_sparse.gluon.copies import KEYS, Distances, GluonProblem, TiledSide
from dit_accel.kernels.block_sparse.gluon.dkdv import block_sparse_gluon_dkdv_kernel
from dit_accel.kernels.block_sparse.gluon.dq import block_sparse_gluon_dq_kernel
from dit_accel.kernels.block_sparse.gluon.forward import block_sparse_gluon_fwd_kernel
from dit_accel.kernels.block_sparse.gluon.items import Queue
from dit_accel.kernels.block_sparse.pieces import multiprocessors
from dit_accel.kernels.block_sparse.triton import BlockSparseLaunches, PlanLaunches, plan_key
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.records import Lists
from dit_accel.kernels.tuning import RASTER

__all__ = ["backward", "forward"]

LOG2E = math.log2(math.e)
ROWS = 64  # of a consumer
ENDLESS = 0x7FFF0000  # an axis of a descriptor that bounds nothing
STAGES = 3  # steps of 128 keys and values in shared memory, as many as it holds with D = 128
STAGES_DQ, STAGES_DKDV = 2, 4  # of dk and dv: units of 64 queries and gradients
# 12 warps in all; the kernel shares registers out.
LAUNCHES = (Launch(4, STAGES, KEYS.value, registers=168),)


def forward(call: BlockSparseInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE fp32 [B, H, Nq].

    A tensor that the copy engine cannot address is copied, and so is q if the scale is not above 0.
    """
    q, k, v, *_ = call
    key = plan_key(call)
    past = _PLAN_LAUNCHES.get(key)
    if past is not None:
        out, lse, lists, samples = past.prepare(call)
        pairs, problem, queue = past.others
        descriptors = [_like(known, x) for x, pair in zip((q, k, v, out), pairs, strict=True) for known in pair]
        with torch.cuda.device(q.device):
            past.forward.repeat(
                lse,
                *descriptors,
                problem._replace(places=lists.places, spans=lists.spans, words=lists.words, tensors=samples.tensors),
                queue._replace(counter=counter_on(q.device)),
            )
        return out.transpose(1, 2), lse
    read = q, k, v
    launches = GluonLaunches(call)
    ordered, (out, lse) = launches.ordered(), launches.empty_outputs(q)
    q, scale = with_positive_scale(q, call.scale)
    (pairs, distances), problem = launches.described(q, k, v, out), launches.problem(launches.with_words(ordered))
    programs, queue = launches.in_turn(launches.query_blocks)
    tensors = lse, *(descriptor for pair in pairs for descriptor in pair), problem, queue
    launched = tuning.launch(
        block_sparse_gluon_fwd_kernel, programs,
        (*tensors, distances, scale * LOG2E, launches.query_tokens), launches.constants(), LAUNCHES, (),
    )  # fmt: skip
    in_place = all(x.data_ptr() == pair[0].base.data_ptr() for x, pair in zip(read, pairs, strict=False))
    if launched is not None and in_place:
        known = [[_like(descriptor, None) for descriptor in pair] for pair in pairs]
        others = (
            known,
            problem._replace(places=None, spans=None, words=None, tensors=None),
            queue._replace(counter=None),
        )
        launches.remember(_PLAN_LAUNCHES, key, launched.after(len(tensors)), others)
    return out.transpose(1, 2), lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, call: BlockSparseInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each [B, H, N, D] laid out in memory as [B, N, H, D]; the same bits in every run."""
    q, k, v, _, _, geometry, scale = call
    launches = GluonLaunches(call)
    ordered, transposed = launches.both_ways()
    listed = launches.with_words(ordered)
    batch, heads, _, _ = q.shape
    tile_q, tile_k = launches.tiles
    half, part = half_of(tile_q), tile_k if geometry.block_k == ROWS else half_of(tile_k)
    statistics = q.new_empty(batch, heads, launches.query_blocks, 4 * ROWS, dtype=torch.float32)
    dq, dk, dv = (launches.empty_rows(x) for x in (q, k, v))
    of_queries = [describe(x, geometry.query_grid, half, ROWS) for x in (q, grad_out.to(q.dtype), out)]
    whole, parts = (
        [describe(x, geometry.grid, *box) for x in (k, v)] for box in ((tile_k, geometry.block_k), (part, ROWS))
    )

    pairs, distances = zip(*of_queries, *whole, strict=True)
    written, _ = describe(dq.transpose(1, 2), geometry.query_grid, half, ROWS)
    tuning.launch(
        block_sparse_gluon_dq_kernel, launches.programs(launches.query_blocks),
        (
            lse, lse if grad_lse is None else grad_lse.contiguous(), statistics,
            *(descriptor for pair in (*pairs, written) for descriptor in pair),
            launches.problem(listed, grad_lse is not None), distances, scale, launches.query_tokens,
        ),
        {**launches.constants(), "STAGES": STAGES_DQ}, LAUNCHES, (),
    )  # fmt: skip

    pairs, distances = zip(*of_queries[:2], *parts, strict=True)
    visits = transposed.visits(listed)
    by_keys = Lists(visits.places, visits.firsts, visits.words, launches.key_blocks, visits.per_head)
    both = (describe(x.transpose(1, 2), geometry.grid, part, ROWS)[0] for x in (dk, dv))
    tuning.launch(
        block_sparse_gluon_dkdv_kernel, launches.programs(launches.key_blocks),
        (
            statistics, *(descriptor for pair in (*pairs, *both) for descriptor in pair),
            visits, launches.problem(by_keys, transposed.numbers is not None), distances, scale, k.shape[2],
        ),
        {**launches.constants(), "PART_K": part, "STAGES": STAGES_DKDV}, LAUNCHES, (),
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


_PLAN_LAUNCHES: dict[Any, PlanLaunches] = {}


class GluonLaunches(BlockSparseLaunches):
    """What the Gluon kernels of one call share."""

    @property
    def tiles(self) -> tuple[Shape, Shape]:
        """Of query blocks and of key blocks."""
        return self.query_order.tile or RASTER, self.key_order.tile or RASTER

    def constants(self) -> dict[str, Any]:
        return constants(self.head_dim, self.key_order.block, *self.tiles)

    def described(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> tuple[tuple[tuple[TensorDescriptor, TensorDescriptor], ...], tuple[Distances, ...]]:
        """Both descriptors of q, k, v and the output [B, N, H, D], and distances of what is read."""
        geometry, (tile_q, tile_k) = self.geometry, self.tiles
        of_queries = geometry.query_grid, half_of(tile_q), ROWS
        of_keys = geometry.grid, tile_k, geometry.block_k
        read = describe(q, *of_queries), describe(k, *of_keys), describe(v, *of_keys)
        written, _ = describe(out.transpose(1, 2), *of_queries)
        return (*(pair for pair, _ in read), written), tuple(distances for _, distances in read)

    def programs(self, blocks: int) -> tuple[int, int, int]:
        return blocks, self.heads_of_sample, self.batch

    def in_turn(self, blocks: int) -> tuple[tuple[int], Queue]:
        """The programs of a launch, one on each multiprocessor, and what they take `blocks` of every head from."""
        return queue_of(blocks, self.batch * self.heads_of_sample, self.lists.counts.device)

    def problem(self, lists: Lists, optional: bool = False) -> GluonProblem:
        """`optional`: whether the kernel's optional tensor is read."""
        samples = self.samples._replace(present=self.samples.present + 4 * optional)
        queries, keys = TiledSide.of(self.query_order), TiledSide.of(self.key_order)
        return GluonProblem.of(lists, samples, queries, keys, self.query_order, self.heads_of_sample)


def queue_of(blocks: int, heads: int, device: torch.device) -> tuple[tuple[int], Queue]:
    """As `GluonLaunches.in_turn`; `heads` are those of all samples."""
    assert len(LAUNCHES) == 1, "to be timed, a second candidate would run with the counter that the first has spent"
    items = blocks * heads
    return (min(items, multiprocessors(device)),), Queue(counter_on(device), items, heads)


def counter_on(device: torch.device) -> torch.Tensor:
    """int32 [1], 0: of a launch alone, since launches of two streams may run at once."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def with_positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Queries and a scale above 0 that give the same logits; q itself if the scale is above 0."""
    if scale > 0:
        return q, scale
    return q * math.copysign(1.0, scale) if scale else torch.zeros_like(q), -scale or 1.0


def _like(known: TensorDescriptor, base: torch.Tensor | None) -> TensorDescriptor:
    """A descriptor like a known one, which was checked, of another tensor."""
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(vars(known), base=base)
    return descriptor


def constants(head_dim: int, block_k: int, tile_q: Shape, tile_k: Shape) -> dict[str, Any]:
    """The kernel's compile-time constants; (0, 0, 0) is the tile of raster order."""
    return {
        "D": head_dim,
        "BLOCK_K": block_k,
        "TILE_Q": tile_q,
        "HALF": half_of(tile_q),
        "TILE_K": tile_k,
        "STAGES": STAGES,
    }


def half_of(tile: Shape) -> Shape:
    """The part of a query tile that one consumer has: the first half of its slots."""
    axis = next((i for i, size in enumerate(tile) if size > 1), 0)
    return tuple(size // 2 if i == axis else size for i, size in enumerate(tile))  # type: ignore[return-value]


def describe(
    x: torch.Tensor, grid: Shape, tile: Shape, rows: int
) -> tuple[tuple[TensorDescriptor, TensorDescriptor], Distances]:
    """How the copy engine finds rows of x [B, H, N, D], see `forward`.

    Args:
        grid: of the visual tokens.
        tile: what one copy brings of it; (0, 0, 0) for raster order, where runs bring everything.
        rows: that one copy brings.

    Returns:
        The descriptors of tiles and of runs, and distances between heads.
    """
    distances = _distances(x)
    if distances is None:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        distances = _distances(x)
        assert distances is not None
    row, by_batch, by_head, column = distances
    columns = (x.shape[1] - 1) * column + x.shape[3]
    tiled, run = (TensorDescriptor(x, *box) for box in _boxes_in_rows(grid, tile, rows, x.shape[3], row, columns))
    return (tiled, run), Distances(by_batch, by_head, column)


@functools.lru_cache(maxsize=256)
def _boxes_in_rows(
    grid: Shape, tile: Shape, rows: int, dim: int, row: int, columns: int
) -> tuple[tuple[Any, ...], ...]:
    """Shape, strides, box and layout of both descriptors of a tensor with rows of `columns`, `row` elements apart."""
    _, height, width = grid
    run = [ENDLESS, ENDLESS, 1 << 30, columns], [(1 << 34) - row, row, row, 1], [1, 1, rows, dim]
    tiled = [ENDLESS, *grid, columns], [row, height * width * row, width * row, row, 1], [1, *tile, dim]
    return tuple(
        (*box, gl.NVMMASharedLayout(128, 16, rank=len(box[0]))) for box in ((run if tile == RASTER else tiled), run)
    )


def _distances(x: torch.Tensor) -> tuple[int, int, int, int] | None:
    """Elements from row to row; rows from sample to sample and from head to head; elements from head to head.

    None if the copy engine cannot have it so.
    """
    batch, heads, tokens, dim = x.shape
    by_batch, by_head, row, element = x.stride()
    row = dim if tokens == 1 else row
    by_batch, by_head = by_batch if batch > 1 else 0, by_head if heads > 1 else 0
    if element != 1 or row < dim or row % 8 or x.data_ptr() % 16 or by_batch % row:
        return None
    if by_head % row == 0:
        return row, by_batch // row, by_head // row, 0
    return None if by_head % 8 else (row, by_batch // row, 0, by_head)
