"""The work of declared rows, counted from their plans: any computer does it, and no attention is computed."""

from __future__ import annotations

from typing import Any

from dit_accel.bench.rows import Row
from dit_accel.bench.run import PRODUCTS
from dit_accel.plans.routed import RoutedPlan
from dit_accel.registry import plan


def count(row: Row) -> dict[str, Any]:
    """A row's declaration with its work, in 10^12 operations of all heads: matrix products alone.

    Returns:
        `tflop`: least and most, of the attended pairs; `block_tflop`: of the blocks that a kernel visits, None if only
        a call tells; `dense_tflop`: of all pairs.

    Raises:
        DitAccelError: the setting does not fit the shape, or comes not near its density.
    """
    shape = row.shape
    made = plan(row.setting.method, shape.grid, **row.setting.config_on(shape.grid))
    each = 2 * PRODUCTS[row.direction] * shape.head_dim * shape.heads / 1e12
    if isinstance(made, RoutedPlan):
        bounds, visited, orders = made.bounds, made.visited, (made.query_order, made.key_order)
        computed = None if visited is None else visited * orders[0].block * orders[1].block * each
    else:
        assert made.pairs is not None
        bounds, computed = (made.pairs, made.pairs), shape.tokens**2 * each
        if made.pairs < shape.tokens**2:
            blocks = made.block_mask()
            computed = blocks.visited * blocks.query_order.block * blocks.key_order.block * each * made.head_share
    found = {"tflop": [pairs * each for pairs in bounds], "block_tflop": computed}
    return {**row.as_dict(), **found, "dense_tflop": shape.tokens**2 * each}
