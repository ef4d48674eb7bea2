"""What every implementation of sparse-linear attention shares: a call's settings, its blocks, the feature maps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from dit_accel.kernels.block_sparse.geometry import Shape
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

FeatureMap = Literal["softmax", "elu", "relu", "focused", "hedgehog"]
LinearScope = Literal["all", "marginal"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)
LINEAR_SCOPES: tuple[str, ...] = get_args(LinearScope)

# Added to the denominator of the linear branch, as published (thu-ml/SLA, sparse_linear_attention/core.py).
EPSILON = 1e-5


class SlaCall(NamedTuple):
    """Arguments of a call besides q, k, v and the block lists; see `dit_accel.kernels.sla.api`.

    query_order, key_order: the sequence, cut into blocks of queries and blocks of keys.
    impl: the name of the implementation that runs.
    text_len, text_bias: int32 [B] and [B, N] on the device of q, or None.
    lists: critical and negligible blocks as `portable.route` returns them; None: the call is routed.
    features: weight and bias of the learned map, [2, H, D, D] and [2, H, D], H may be 1; None with every other map.
    """

    query_order: TokenOrder
    key_order: TokenOrder
    text_len: torch.Tensor | None
    text_bias: torch.Tensor | None
    scale: float
    feature_map: FeatureMap
    linear_scope: LinearScope
    weight: torch.Tensor
    bias: torch.Tensor | None
    features: tuple[torch.Tensor, torch.Tensor] | None
    impl: str
    lists: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def grid(self) -> TokenGrid:
        return self.key_order.grid

    @property
    def cuts(self) -> Cuts:
        return Cuts.of(self.query_order, self.key_order)


class Cut(NamedTuple):
    """How visual tokens are cut into blocks. Custom ops carry it as seven integers, which are symbols when traced.

    grid: frames, rows and columns of the visual tokens.
    block: tokens in a block.
    tile: (t, h, w) of blocks that are 3-D tiles; None for runs in raster order.
    """

    grid: Shape
    block: int
    tile: Shape | None = None

    @classmethod
    def of(cls, order: TokenOrder) -> Cut:
        return cls(order.grid.shape, order.block, order.tile)

    def pack(self) -> list[int]:
        """The integers, in the order of the custom ops' arguments."""
        return [*self.grid, self.block, *(self.tile or (0, 0, 0))]

    @classmethod
    def unpack(cls, ints: Sequence[int]) -> Cut:
        """The inverse of `pack`."""
        frames, rows, columns, block, *tile = ints
        return cls((frames, rows, columns), block, (tile[0], tile[1], tile[2]) if tile[1] else None)

    @property
    def order(self) -> TokenOrder:
        """The order of the visual tokens alone."""
        return TokenOrder(TokenGrid(*self.grid), self.block, self.tile)

    @property
    def blocks(self) -> int:
        """``order.visual_blocks``; also works for symbols."""
        if self.tile is None:
            return (math.prod(self.grid) + self.block - 1) // self.block
        return math.prod((size + piece - 1) // piece for size, piece in zip(self.grid, self.tile, strict=True))


class Cuts(NamedTuple):
    """How visual tokens are cut into blocks of queries and into blocks of keys; both of one grid."""

    queries: Cut
    keys: Cut

    @classmethod
    def of(cls, query_order: TokenOrder, key_order: TokenOrder) -> Cuts:
        return cls(Cut.of(query_order), Cut.of(key_order))

    def pack(self) -> list[int]:
        """The integers of both, in the order of the custom ops' arguments."""
        return [*self.queries.pack(), *self.keys.pack()]

    @classmethod
    def unpack(cls, ints: Sequence[int]) -> Cuts:
        """The inverse of `pack`."""
        half = len(ints) // 2
        return cls(Cut.unpack(ints[:half]), Cut.unpack(ints[half:]))


class KeySegments(NamedTuple):
    """The first row of each segment of the keys, and the numbers of conditioning and text tokens."""

    visual_start: int
    conditioning_start: int
    text_start: int
    conditioning: int
    text: int

    @classmethod
    def of(cls, grid: TokenGrid) -> KeySegments:
        return cls(grid.visual_start, grid.conditioning_start, grid.text_start, grid.conditioning, grid.text)


def visual_of(x: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """The visual tokens of [B, H, N, D]: a view, or x itself if all tokens are visual."""
    # autograd copies the gradient of a slice into zeros, even if the slice is the whole tensor
    return x if grid.visual == grid.tokens else x[:, :, grid.visual_rows]


def to_blocks(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """[..., visual, D] in raster order to [..., blocks, block, D]; padding slots are 0."""
    if order.tile is not None:
        tokens, _ = _permutation(order, x.device)
        # Padding slots read the added row of zeros.
        x = F.pad(x, (0, 0, 0, 1)).index_select(-2, tokens)
    elif padding := order.visual_blocks * order.block - order.grid.visual:
        x = F.pad(x, (0, 0, 0, padding))
    return x.unflatten(-2, (order.visual_blocks, order.block))


def from_blocks(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """[..., blocks, block, D] to [..., visual, D] in raster order, without padding slots."""
    x = x.flatten(-3, -2)
    if order.tile is None:
        return x[..., : order.grid.visual, :]
    _, slots = _permutation(order, x.device)
    return x.index_select(-2, slots)


@functools.lru_cache(maxsize=16)
def _permutation(order: TokenOrder, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of every slot (`visual` for padding) and the slot of every token: int64."""
    tokens = order.index()
    slots = torch.empty(order.grid.visual, dtype=torch.int64)
    filled = (tokens >= 0).nonzero().squeeze(1)
    slots[tokens[filled]] = filled
    tokens = torch.where(tokens < 0, order.grid.visual, tokens)
    return tokens.to(device), slots.to(device)


def learned_inputs(
    q: torch.Tensor, k: torch.Tensor, features: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the feature map takes of q and k [B, H, *, D]: ``x W^T + b``, fp32 or wider; without features q and k.

    Args:
        features: W [2, H or 1, D, D] and b [2, H or 1, D], for queries and for keys; see `apply_map`.
    """
    if features is None:
        return q, k
    wide = torch.promote_types(q.dtype, torch.float32)
    weight, bias = (x.to(wide) for x in features)
    queries, keys = (x.to(wide) @ w.mT + b[:, None] for x, w, b in zip((q, k), weight, bias, strict=True))
    return queries, keys


def apply_map(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi(x), never negative, [..., D], or [..., 2 D] of "hedgehog".

    "softmax" is over the head dimension. "elu" is ``elu(x) + 1``, "relu" ``relu(x)``.

    "focused": ``|r| r**3 / |r**3|`` with r = relu(x), which keeps the norm of r and turns it towards its largest
    values. Source: FLatten (arXiv 2308.00442), section 4.1, with its power of 3. Its learned scale of q and k, and the
    depthwise convolution of v beside the attention, are left out.

    "hedgehog": the softmax of x beside that of -x, where x is one of `learned_inputs`. Source: Hedgehog
    (arXiv 2402.04347), section 4. The paper writes exp(x) and exp(-x); its authors' later code (LoLCATs) divides each
    half by its sum, which no dtype overflows, and so does this.

    Args:
        x: [..., D], fp32 or wider. There is no factor 1/sqrt(D), as published.
        feature_map: one of `FEATURE_MAPS`.
    """
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    rectified = x.relu()
    if feature_map == "relu":
        return rectified
    # the map does not change with the cubes' size, so their peak is 1; a row of zeros stays 0
    peak = rectified.detach().amax(-1, keepdim=True)
    cubes = (rectified / torch.where(peak > 0, peak, 1)) ** 3
    return cubes * (_norm(rectified) / _norm(cubes).clamp(min=1))


def pull_back(gradient: torch.Tensor, x: torch.Tensor, mapped: torch.Tensor, feature_map: str) -> torch.Tensor:
    """dL/dx [..., D] from ``gradient = dL/dphi`` and ``mapped = phi(x)``."""
    if feature_map == "softmax":
        return mapped * (gradient - (mapped * gradient).sum(-1, keepdim=True))
    if feature_map == "elu":
        return gradient * mapped.clamp(max=1.0)
    if feature_map == "hedgehog":
        halves = zip(gradient.chunk(2, -1), mapped.chunk(2, -1), strict=True)
        of_x, of_negative = (pull_back(part, x, phi, "softmax") for part, phi in halves)
        return of_x - of_negative
    if feature_map == "relu":
        return gradient * (x > 0)
    # phi = |r| u with the unit vector u of r**3
    size, length = torch.where(x > 0, x, torch.inf), _norm(mapped)
    unit = mapped / torch.where(length > 0, length, 1)
    along = (gradient * unit).sum(-1, keepdim=True)
    turned = 3 * mapped / size * (gradient - along * unit)
    return turned + along * x.relu() / torch.where(length > 0, length, 1)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
