"""Token grids and orders."""

import pytest
import torch
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid


def test_segments_lie_in_model_order():
    first = TokenGrid(2, 3, 4, text=5, text_first=True, conditioning=7)
    last = TokenGrid(2, 3, 4, text=5, conditioning=7)
    assert (first.text_start, first.visual_start, first.conditioning_start, first.tokens) == (0, 5, 29, 36)
    assert (last.visual_start, last.conditioning_start, last.text_start, last.tokens) == (0, 24, 31, 36)


def test_coordinates_are_raster():
    coordinates = TokenGrid(2, 3, 4).coordinates()
    assert coordinates.shape == (24, 3)
    assert coordinates[0].tolist() == [0, 0, 0]
    assert coordinates[13].tolist() == [1, 0, 1]
    assert TokenGrid(1, 1, 1).coordinates().shape == (1, 3)


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1), (1, -1, 1), (1, 1, 2.0), (True, 1, 1), (1, 1, 1, -1), (1, 1, 1, 0, False, -2)]
)
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(DitAccelError, match=names("TokenGrid")):
        TokenGrid(*sizes)


def test_more_tokens_than_kernels_can_number_are_refused():
    with pytest.raises(DitAccelError, match=names("2,147,483,647 2,147,483,648")):
        TokenGrid(2**11, 2**10, 2**10)


@pytest.mark.parametrize("tile", [None, (2, 2, 2), (3, 1, 5), (4, 4, 4)])
@pytest.mark.parametrize("text_first", [False, True])
def test_an_order_holds_every_token_once(tile, text_first):
    grid = TokenGrid(3, 5, 7, text=9, text_first=text_first, conditioning=4)
    block = 8 if tile is None else tile[0] * tile[1] * tile[2]
    order = TokenOrder(grid, block, tile)
    index = order.index()
    assert len(index) == order.blocks * block
    assert sorted(index[index >= 0].tolist()) == list(range(grid.tokens))
    visual = index[: order.visual_blocks * block]
    visual = visual[visual >= 0] - grid.visual_start
    assert visual.min() == 0
    assert visual.max() == grid.visual - 1


def test_tiles_are_row_major_boxes():
    grid = TokenGrid(2, 4, 4)
    index = TokenOrder(grid, 8, (2, 2, 2)).index().reshape(4, 8)
    assert index[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    border = TokenOrder(TokenGrid(1, 1, 3), 2, (1, 1, 2)).index()
    assert border.tolist() == [0, 1, 2, -1]


@pytest.mark.parametrize(("block", "tile"), [(0, None), (8, (2, 2, 3)), (0, (0, 1, 1)), (4, (2, 2))])
def test_bad_orders_are_refused(block, tile):
    with pytest.raises(DitAccelError):
        TokenOrder(TokenGrid(2, 2, 2), block, tile)


def test_index_is_int64():
    assert TokenOrder(TokenGrid(1, 2, 2), 4).index().dtype == torch.int64


@pytest.mark.parametrize(
    ("grid", "block", "tile"),
    [((1, 1, 1), 2, None), ((2, 3, 7), 16, None), ((3, 5, 7), 16, (2, 2, 4)), ((4, 5, 7), 12, (3, 1, 4))],
)
def test_halves_lie_in_their_block(grid, block, tile):
    order = TokenOrder(TokenGrid(*grid, text=5), block, tile)
    half, parents = order.halved()
    assert half.block * 2 == block and len(parents) == half.blocks
    of_half, of_block = (side.block_of_token() for side in (half, order))
    assert torch.equal(parents[of_half], of_block)
