"""Choosing tile shapes: which 3-D tiles leave a kernel the fewest blocks to visit, and which hold near tokens."""

from __future__ import annotations

import functools
import itertools
import math

from dit_accel.order import TokenOrder
from dit_accel.plans.masks import Mask, Product, axis_pairs
from dit_accel.tokens import TokenGrid

Tile = tuple[int, int, int]
MOST_TERMS = 2  # whose blocks are counted to choose tiles


def choose_tiles(mask: Mask, grid: TokenGrid, block_q: int, block_k: int) -> tuple[Tile, Tile]:
    """Tile shapes of these sizes for a mask.

    One or two products of axes get the shapes with the fewest visited blocks, counted exactly in each (the static-tile
    analysis of GNA, arXiv:2504.16922). Ties go to long rows, which read memory in longer runs. Bands are narrow in
    raster position, so their tiles lie in one frame and are as wide as it allows.
    """
    queries, keys = tile_shapes(block_q, grid.shape), tile_shapes(block_k, grid.shape)
    products = [term for term in mask.terms if isinstance(term, Product)]
    if len(mask.terms) > MOST_TERMS or len(products) < len(mask.terms):
        widest_q, widest_k = (min(shapes, key=lambda shape: (shape[0], shape[1])) for shapes in (queries, keys))
        return widest_q, widest_k

    @functools.cache
    def visited(term: Product, axis: int, size_q: int, size_k: int) -> int:
        return int((axis_pairs(term.axes[axis], size_q, size_k) > 0).sum())

    def cost(pair: tuple[Tile, Tile]) -> tuple[int, ...]:
        query, key = pair
        count = sum(math.prod(visited(term, axis, query[axis], key[axis]) for axis in range(3)) for term in products)
        return count, -key[2], -query[2], -key[1], -query[1]

    return min(itertools.product(queries, keys), key=cost)


def tile_shapes(block: int, shape: Tile) -> list[Tile]:
    """Tiles of `block` tokens, if possible not longer than it takes to cover each axis of the grid."""
    divisors = [size for size in range(1, block + 1) if block % size == 0]
    longest = [next((size for size in divisors if size >= length), block) for length in shape]
    heads = [(t, h) for t in divisors for h in divisors if block % (t * h) == 0]
    shapes = [(t, h, block // (t * h)) for t, h in heads if t <= longest[0] and h <= longest[1]]
    return [tile for tile in shapes if tile[2] <= longest[2]] or shapes


def choose_tile(block: int, grid: TokenGrid) -> Tile:
    """The most compact tile of `block` tokens that adds little padding.

    Routing works on block means, so the tokens of a tile should be near each other. Shapes with
    at most an eighth more blocks than the fewest compete. The smallest sum of sides wins, then the longest rows.
    """

    def blocks(tile: Tile) -> int:
        return TokenOrder(grid, block, tile).visual_blocks

    shapes = tile_shapes(block, grid.shape)
    fewest = min(blocks(tile) for tile in shapes)
    near = [tile for tile in shapes if 8 * blocks(tile) <= 9 * fewest]
    return min(near, key=lambda tile: (sum(tile), -tile[2], -tile[1]))
