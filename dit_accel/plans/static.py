"""Plans whose block mask follows from the grid alone."""

from __future__ import annotations

import abc
import functools
import math
from typing import Any, Literal

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import (
    attend_blocks,
    attend_checked,
    check_tensors,
    gradients_follow,
    in_autocast_dtype,
    opened,
    pack,
)
from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry, Segments
from dit_accel.kernels.impls import AUTO, Impl
from dit_accel.kernels.obstacles import Facts
from dit_accel.order import TokenOrder
from dit_accel.plans import blocks
from dit_accel.plans.blocks import BlockMask
from dit_accel.plans.masks import Mask
from dit_accel.plans.plan import BLOCK_K, BLOCK_Q, Plan, PlanArguments, among_others, building
from dit_accel.plans.tiles import Tile, choose_tiles
from dit_accel.tokens import TokenGrid

Order = Literal["raster", "tile"]
TOKEN_MASK_LIMIT = 20_000
MAP_BLOCKS, MOST_MAPPED = 2**11, 2**14  # of a sequence, and tokens in each: pairs of two blocks fit in 32 bits


class StaticPlan(Plan):
    """A plan whose block mask depends on the grid alone."""

    def __init__(self, method: str, config: Any, grid: TokenGrid) -> None:
        super().__init__(method, config, grid)
        self._lists: dict[tuple[torch.device, str | None], BlockLists] = {}
        self._ready: dict[tuple[Any, ...], tuple[impls.Implementation, BlockLists, BlockLists]] = {}

    @property
    @abc.abstractmethod
    def pairs(self) -> int:
        """Exact number of attended (query, key) pairs, text included."""

    @property
    def density(self) -> float:
        return self.pairs / self.grid.tokens**2

    @abc.abstractmethod
    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether visual token `query` sees visual token `key`: bool, for broadcasting int64 raster indices."""

    def kept_keys(self, queries: torch.Tensor, lists: BlockLists | None = None, head: int = 0) -> torch.Tensor:
        keys = torch.arange(self.grid.visual, device=queries.device)
        return among_others(self.allowed(queries[:, None], keys[None, :]), self.grid)

    @building()
    def token_mask(self) -> torch.Tensor:
        grid = self.grid
        if grid.tokens > TOKEN_MASK_LIMIT:
            raise DitAccelError(
                f"A token mask is made for at most {TOKEN_MASK_LIMIT:,} tokens, this grid has {grid.tokens:,}; "
                "use block_mask(), pairs or density."
            )
        visual = torch.arange(grid.visual)
        mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        mask[grid.visual_rows, grid.visual_rows] = self.allowed(visual[:, None], visual[None, :])
        return mask

    @property
    def needs_whole(self) -> str | None:
        return None if self.config.share == "none" else "it keeps the whole sequence between steps"

    @abc.abstractmethod
    def raster_map(self) -> tuple[torch.Tensor, int]:
        """The blocks of visual keys that visual queries of a block attend to, bool [blocks, blocks], and their tokens.

        Blocks are in raster order, at most `MAP_BLOCKS` unless the plan is defined on blocks.
        """

    def tables(self) -> torch.Tensor | None:
        """The packed tables that decide the pairs of partial blocks; None if blocks are attended whole."""
        return None

    @functools.cached_property
    def _blocks(self) -> BlockMask:
        return self.block_mask()

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Where the tokens of the plan's own blocks lie."""
        return self._blocks.geometry

    def lists(self, device: torch.device, packing: str | None = None) -> BlockLists:
        """The plan's own block lists on `device`, built once, and packed as an implementation wants them."""
        key = device, packing
        if key not in self._lists:
            with building():
                lists = self._blocks.lists(self.tables() if self.geometry.partial_blocks else None).to(device)
                if packing is not None:
                    lists = lists._replace(packed=pack(lists, self.geometry, packing))
                self._lists[key] = lists
        return self._lists[key]

    def prepare(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl = AUTO, *, learned: bool = False
    ) -> tuple[str, str]:
        name, why = self.start(device, dtype, head_dim, impl)
        self.lists(device, impls.named(name).packing)
        return name, why

    def calls(self, learned: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        blocks = {"block_q": self.geometry.block_q, "block_k": self.geometry.block_k}
        return {"attention": (impls.BLOCK_SPARSE, blocks)}

    def chosen(
        self, q: torch.Tensor, impl: Impl, *, gradients: bool, lse: bool = False
    ) -> tuple[impls.Implementation, BlockLists]:
        """What runs a call whose queries are `q` [B, H, N, D], and the plan's lists for it."""
        sizes = q.shape[-1], self.geometry.block_q, self.geometry.block_k
        chosen, _ = impls.choose(Facts(q.device, q.dtype, *sizes, gradients, lse), impl)
        return chosen, self.lists(q.device, chosen.packing)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments) -> torch.Tensor:
        q, k, v = in_autocast_dtype(q, k, v)
        segments, scale, bias = Segments.of(q, call.text_lens), call.scale, call.text_bias
        gradients = gradients_follow(q, k, v)
        if bias is not None:
            chosen, lists = self.chosen(q, call.impl, gradients=gradients, lse=True)
            return attend_blocks(
                q, k, v, lists, self.geometry, segments, text_bias=bias, scale=scale, impl=chosen.name
            )[0]
        key = q.device, q.dtype, q.shape[-1], gradients, call.impl
        if key not in self._ready or call.impl == AUTO:  # what "auto" takes may change
            chosen, lists = self.chosen(q, call.impl, gradients=gradients)
            self._ready[key] = chosen, lists, opened(lists, self.geometry, chosen.packing)
        chosen, lists, views = self._ready[key]
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        blocks_call = BlockSparseInputs(q, k, v, lists, segments, self.geometry, scale)
        check_tensors(blocks_call)
        return attend_checked(chosen, blocks_call, gradients, views)[0]


class MaskPlan(StaticPlan):
    """A static plan exact to the token.

    Args:
        mask: over the visual tokens; text and conditioning tokens attend to and are attended by everything.
        order: of the blocks, unless `block_mask` is asked for another.
    """

    def __init__(self, method: str, config: Any, grid: TokenGrid, mask: Mask, order: Order = "raster") -> None:
        super().__init__(method, config, grid)
        self.mask, self.order = mask, order

    @functools.cached_property
    @building()
    def pairs(self) -> int:
        return self.mask.pairs() + self.grid.dense_pairs

    def tables(self) -> torch.Tensor:
        return self.mask.pack()

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.mask.allowed(query, key)

    def raster_map(self) -> tuple[torch.Tensor, int]:
        counts, size = self.raster_counts()
        return counts > 0, size

    def raster_counts(self) -> tuple[torch.Tensor, int]:
        """The visual pairs between blocks in raster order, int32 [blocks, blocks], and the tokens of a block.

        Raises:
            DitAccelError: a count may not fit in 32 bits.
        """
        size = math.ceil(self.grid.visual / MAP_BLOCKS)
        if size > MOST_MAPPED:
            raise DitAccelError(
                f"Pairs between ranges are counted for at most {MAP_BLOCKS * MOST_MAPPED:,} visual tokens, got "
                f"{self.grid.visual:,}."
            )
        order = TokenOrder(self.grid, size)
        return self.mask.block_pairs(order, order), size

    @building()
    def block_mask(
        self,
        block_q: int | None = None,
        block_k: int | None = None,
        order: Order | None = None,
        tile_q: Tile | None = None,
        tile_k: Tile | None = None,
    ) -> BlockMask:
        """The blocks that hold at least one allowed pair.

        Args:
            block_q, block_k: tokens a query and a key block hold; 128 and 64, or the tiles' own sizes.
            order: "raster", "tile", or None for the plan's choice (tiles if tile shapes are given).
            tile_q, tile_k: tile sizes (t, h, w); without them the planner takes those with the fewest visited blocks.

        Raises:
            DitAccelError: shapes and sizes contradict each other, or there are too many blocks.
        """
        if (tile_q is None) != (tile_k is None):
            raise DitAccelError(f"Give both tile_q and tile_k or neither, got {tile_q} and {tile_k}.")
        if order is None:
            order = self.order if tile_q is None else "tile"
        if order not in ("raster", "tile"):
            raise DitAccelError(f"order is 'raster', 'tile' or None, got {order!r}.")
        defaults = (BLOCK_Q, BLOCK_K) if tile_q is None or tile_k is None else (math.prod(tile_q), math.prod(tile_k))
        sizes = [default if size is None else size for size, default in zip((block_q, block_k), defaults, strict=True)]
        if order == "raster":
            if tile_q is not None:
                raise DitAccelError("Tile shapes were given with order='raster'; ask for order='tile'.")
            orders = [TokenOrder(self.grid, size) for size in sizes]
        else:
            if tile_q is None or tile_k is None:
                blocks.check_size(*(TokenOrder(self.grid, size) for size in sizes))
                tile_q, tile_k = choose_tiles(self.mask, self.grid, *sizes)
            orders = [TokenOrder(self.grid, size, tile) for size, tile in zip(sizes, (tile_q, tile_k), strict=True)]
        return blocks.from_mask(self.mask, *orders)
