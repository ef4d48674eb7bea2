"""Calls that hold some of a sequence's tokens: the queries of one process, and the keys of one process or another.

The lists and the geometry stay those of the whole sequence. Tokens that a call does not hold are cut out of its blocks,
wherever the cut lies, so the pairs are exact to the token. `portable` takes such calls.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.geometry import Geometry

Runs = tuple[tuple[int, int], ...]  # start and stop of runs of canonical tokens, ascending


@dataclasses.dataclass(frozen=True)
class Held:
    """The canonical tokens that a call holds of each side. Its rows are these tokens, in ascending order."""

    queries: Runs
    keys: Runs

    def cut(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """The held token of every slot of all query blocks and key blocks: int64 [slots], -1 without one."""
        query_order, key_order = geometry.orders
        return _among(query_order.index(), self.queries), _among(key_order.index(), self.keys)


@dataclasses.dataclass(frozen=True)
class HeldPlacement:
    """In place of a `Placement`: one sample's rows. `text_len` counts the valid text of the whole sequence."""

    held: Held
    text_len: int

    def rows(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Row in memory of every canonical token of queries and keys: int64 [tokens]; -1 where it is not held."""
        sides = zip(geometry.orders, (self.held.queries, self.held.keys), strict=True)
        queries, keys = (_rows(order.grid.tokens, runs) for order, runs in sides)
        return queries, keys


def count(runs: Runs) -> int:
    """Tokens of runs."""
    return sum(stop - start for start, stop in runs)


def _among(tokens: Tensor, runs: Runs) -> Tensor:
    held = torch.zeros_like(tokens, dtype=torch.bool)
    for start, stop in runs:
        held |= (tokens >= start) & (tokens < stop)
    return tokens.where(held, -1)


def _rows(tokens: int, runs: Runs) -> Tensor:
    rows = torch.full((tokens,), -1, dtype=torch.int64)
    first = 0
    for start, stop in runs:
        rows[start:stop] = torch.arange(first, first + stop - start)
        first += stop - start
    return rows
