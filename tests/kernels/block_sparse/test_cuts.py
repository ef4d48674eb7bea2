"""Blocks that are too large for kernels run in parts, which attend the same pairs."""

import dataclasses

import pytest
import torch

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import attend_blocks
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, cut_blocks
from dit_accel.order import TokenOrder
from dit_accel.plans.block_plan import BlockPlan
from dit_accel.tokens import TokenGrid

GRID = TokenGrid(3, 5, 7, text=11, conditioning=6)
ORDERS = {
    "raster": (TokenOrder(GRID, 32), TokenOrder(GRID, 16)),
    "tiles": (TokenOrder(GRID, 32, (2, 4, 4)), TokenOrder(GRID, 16, (1, 4, 4))),
    "thin tiles": (TokenOrder(GRID, 64, (1, 2, 32)), TokenOrder(GRID, 32, (32, 1, 1))),
}


def random_lists(queries, keys, shape, marked):
    generator = torch.Generator().manual_seed(0)
    listed = torch.rand(*shape, queries.blocks, keys.blocks, generator=generator) < 0.5
    order = torch.rand(listed.shape, generator=generator).masked_fill(~listed, 2.0).argsort(-1)
    counts = listed.sum(-1, dtype=torch.int32)
    indices = order.int().masked_fill(torch.arange(keys.blocks) >= counts[..., None], 10**6)  # not to be read
    partial = torch.rand(listed.shape, generator=generator) < 0.5 if marked else None
    return BlockLists(indices, counts, partial, torch.zeros(4, dtype=torch.int32) if marked else None)


def pairs(lists, geometry, entries):
    """The pairs of tokens in marked entries: bool [..., tokens, tokens]."""
    queries, keys = (order.block_of_token() for order in geometry.orders)
    return lists.map(entries, geometry.key_order.blocks)[..., queries, :][..., keys]


@pytest.mark.parametrize("cuts", [{"block_q": 8}, {"block_k": 4}, {"block_q": 16, "block_k": 8}, {"block_q": 64}])
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["shared", "per head"])
@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
def test_parts_list_the_same_pairs(orders, shape, cuts):
    for marked in (False, True):
        lists, geometry = random_lists(*orders, shape, marked), Geometry.of(*orders, partial_blocks=5)
        small, cut = cut_blocks(lists, geometry, cuts)
        assert cut.block_q == min(geometry.block_q, cuts.get("block_q", 1024))
        assert cut.block_k == min(geometry.block_k, cuts.get("block_k", 1024))
        assert (small.indices[small.used] >= 0).all() and int(small.counts.max()) <= small.indices.shape[-1]
        assert torch.equal(pairs(small, cut, small.used), pairs(lists, geometry, lists.used))
        if marked:
            found, want = (
                pairs(small, cut, small.used & small.partial),
                pairs(lists, geometry, lists.used & lists.partial),
            )
            assert torch.equal(found, want) and small.tables is lists.tables
        if (cut.block_q, cut.block_k) == (geometry.block_q, geometry.block_k):
            assert small is lists and cut is geometry
        else:
            assert cut.partial_blocks >= 5 * geometry.block_q // cut.block_q


@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
def test_attention_over_parts_is_attention_over_blocks(orders, monkeypatch):
    lists, geometry = random_lists(*orders, (1, 2), False), Geometry.of(*orders)
    q, k, v = torch.randn(3, 1, 2, GRID.tokens, 8, dtype=torch.float64).unbind(0)
    want = attend_blocks(q, k, v, lists, geometry, lse=True, impl="reference")
    row = dataclasses.replace(impls.named("reference"), cuts={"block_q": 8, "block_k": 4})
    monkeypatch.setitem(impls._TABLE, (row.kernel, row.name), row)
    for result, wanted in zip(attend_blocks(q, k, v, lists, geometry, lse=True, impl="reference"), want, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-13, atol=1e-13)


def test_whole_blocks_of_a_static_plan_are_cut():
    grid = TokenGrid(7, 20, 11)
    visited = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    visited[range(4), range(4)] = True
    plan = BlockPlan("radial", None, grid, 512, visited)
    assert (plan.geometry.block_q, plan.block_mask().query_order.block) == (128, 512)
    lists = plan.lists(torch.device("cpu"))
    tokens = torch.arange(grid.tokens)
    assert torch.equal(pairs(lists, plan.geometry, lists.used), plan.allowed(tokens[:, None], tokens))
