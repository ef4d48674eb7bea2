"""The mask algebra and block cover against brute force on random masks, grids, tiles and both orders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.order import TokenOrder
from dit_accel.plans import blocks
from dit_accel.plans.masks import HEADER, AxisTable, Band, Mask, Product
from dit_accel.tokens import TokenGrid

axis_length = st.integers(1, 6)


@st.composite
def axis_tables(draw, length):
    start = draw(st.lists(st.integers(0, length - 1), min_size=length, max_size=length))
    size = draw(st.lists(st.integers(0, length), min_size=length, max_size=length))
    start = torch.tensor(start)
    stop = torch.minimum(start + torch.tensor(size), torch.tensor(length))
    return AxisTable(start, stop, draw(st.integers(1, 3)))


@st.composite
def masks(draw):
    shape = t, h, w = draw(st.tuples(axis_length, axis_length, axis_length))
    if draw(st.booleans()):
        return Mask((Product(*(draw(axis_tables(length)) for length in shape)),))
    radii = draw(st.lists(st.integers(0, h * w + 1), min_size=t * t, max_size=t * t))
    radius = torch.tensor(radii).reshape(t, t).clamp(max=h * w)
    split = torch.tensor(draw(st.lists(st.booleans(), min_size=t * t, max_size=t * t))).reshape(t, t)
    return Mask((Band(radius * split, h, w), Band(radius * ~split, h, w)))


@st.composite
def orders(draw, grid):
    if draw(st.booleans()):
        return tuple(TokenOrder(grid, draw(st.integers(1, 20))) for _ in range(2))
    tiles = [draw(st.tuples(*[st.integers(1, 3)] * 3)) for _ in range(2)]
    return tuple(TokenOrder(grid, t * h * w, (t, h, w)) for t, h, w in tiles)


def token_map(mask):
    tokens = torch.arange(mask.shape[0] * mask.shape[1] * mask.shape[2])
    return mask.allowed(tokens[:, None], tokens[None, :])


def in_blocks(tokens, query_order, key_order, padding):
    """A map of tokens in block order, padding slots filled: [blocks_q, block_q, blocks_k, block_k]."""
    padded = torch.nn.functional.pad(tokens, (0, 1, 0, 1), value=padding)
    rows, columns = query_order.index(), key_order.index()
    shape = (query_order.blocks, query_order.block, key_order.blocks, key_order.block)
    return padded[rows][:, columns].reshape(shape)


@settings(max_examples=150)
@given(st.data())
def test_counts_equal_brute_force(data):
    mask = data.draw(masks())
    query_order, key_order = data.draw(orders(TokenGrid(*mask.shape)))
    tokens = token_map(mask)
    assert mask.pairs() == int(tokens.sum())
    expected = in_blocks(tokens, query_order, key_order, False).sum((1, 3))
    assert torch.equal(mask.block_pairs(query_order, key_order).long(), expected)


@settings(max_examples=150)
@given(st.data())
def test_classes_equal_brute_force(data):
    mask = data.draw(masks())
    around = {"text": data.draw(st.integers(0, 9)), "conditioning": data.draw(st.integers(0, 5))}
    grid = TokenGrid(*mask.shape, text_first=data.draw(st.booleans()), **around)
    query_order, key_order = data.draw(orders(grid))
    block_mask = blocks.from_mask(mask, query_order, key_order)

    tokens = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    visual = slice(grid.visual_start, grid.visual_start + grid.visual)
    tokens[visual, visual] = token_map(mask)
    some = in_blocks(tokens, query_order, key_order, False).any(3).any(1)
    every = in_blocks(tokens, query_order, key_order, True).all(3).all(1)
    assert torch.equal(block_mask.dense(), some)
    assert block_mask.visited == int(some.sum())
    assert block_mask.full == int((some & every).sum())
    for row in range(query_order.blocks):
        listed = block_mask.kv_indices[row, : block_mask.kv_counts[row]].tolist()
        assert listed == some[row].nonzero().flatten().tolist()
        assert block_mask.partial[row, : len(listed)].tolist() == (~every[row][some[row]]).tolist()
        assert not block_mask.partial[row, len(listed) :].any()


def test_tiles_of_thousands_of_tokens_are_counted_exactly():
    """A pair of them has more pairs of tokens than float32 has integers."""
    mask = Mask((Band(torch.tensor([[6001, 4001], [3, 5999]]), 96, 64),))
    order = TokenOrder(TokenGrid(2, 96, 64), 96 * 64, (1, 96, 64))
    assert mask.block_pairs(order, order).tolist() == [
        [mask_pairs(6144, 6001), mask_pairs(6144, 4001)],
        [mask_pairs(6144, 3), mask_pairs(6144, 5999)],
    ]


def mask_pairs(length, radius):
    """Pairs of positions less than `radius` apart."""
    return length + 2 * sum(length - distance for distance in range(1, radius))


@settings(max_examples=60)
@given(masks())
def test_packed_tables_say_the_same(mask):
    """Reads the packed words as a kernel does, on its own."""
    words = mask.pack()
    assert words.dtype == torch.int32
    t, h, w = mask.shape
    tokens = torch.arange(t * h * w)
    query = (tokens // (h * w), tokens // w % h, tokens % w)
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for term in range(int(words[0])):
        kind, *rest = words[1 + term * HEADER : 1 + (term + 1) * HEADER].tolist()
        if kind == 1:
            radius = words[rest[0] : rest[0] + t * t].reshape(t, t)[query[0]][:, query[0]]
            p = tokens % (h * w)
            seen |= (p[:, None] - p).abs() < radius
            continue
        allowed = torch.ones_like(seen)
        for axis, (offset, step, length) in enumerate(zip(rest[:3], rest[3:6], (t, h, w), strict=True)):
            start, stop = words[offset : offset + 2 * length].reshape(length, 2)[query[axis]].unbind(1)
            key = query[axis][None, :]
            allowed &= (key >= start[:, None]) & (key < stop[:, None]) & ((key - start[:, None]) % step == 0)
        seen |= allowed
    assert torch.equal(seen, token_map(mask))


def test_long_axes_count_without_a_table_of_prefixes():
    length = 5000
    table = AxisTable(
        torch.arange(length).clamp(max=length - 64), (torch.arange(length) + 64).clamp(max=length), step=3
    )
    edges = torch.tensor([0, 77, 1000, 4999, 5000])
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None, :]
    allowed = table.allowed(queries, keys)
    expected = torch.stack([torch.stack([allowed[:i, :j].sum() for j in edges]) for i in edges])
    assert torch.equal(table.prefix(edges, edges), expected)


def test_terms_that_overlap_are_refused():
    full = Product(*(AxisTable.full(length) for length in (2, 2, 2)))
    with pytest.raises(DitAccelError, match=names("disjoint")):
        Mask((full, full))
    with pytest.raises(DitAccelError, match=names("disjoint")):
        Mask((full, Band(torch.eye(2, dtype=torch.int64), 2, 2)))
    with pytest.raises(DitAccelError, match=names("grid")):
        Mask((full, Band(torch.zeros(3, 3, dtype=torch.int64), 2, 2)))
    with pytest.raises(DitAccelError, match=names("term")):
        Mask(())


@settings(max_examples=100)
@given(st.data())
def test_overlap_of_axes_is_exact(data):
    length = data.draw(st.integers(1, 12))
    first, second = data.draw(axis_tables(length)), data.draw(axis_tables(length))
    position = torch.arange(length)
    both = first.allowed(position[:, None], position) & second.allowed(position[:, None], position)
    assert first.meets(second) == second.meets(first) == bool(both.any())


def test_disjoint_products_add_up():
    halves = [AxisTable(torch.full((4,), start), torch.full((4,), start + 2)) for start in (0, 2)]
    full = AxisTable.full(3)
    mask = Mask(tuple(Product(half, full, full) for half in halves))
    assert mask.pairs() == 36**2
    assert token_map(mask).all()


def test_mixed_orders_are_refused():
    grid = TokenGrid(2, 2, 2)
    mask = Mask((Product(*(AxisTable.full(2) for _ in range(3))),))
    with pytest.raises(DitAccelError, match=names("tiles")):
        mask.block_pairs(TokenOrder(grid, 4), TokenOrder(grid, 4, (1, 2, 2)))
