"""Sizes are refused before Diffusers rounds them, and the grid is the one the transformer sees."""

import pytest
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.sizes import Sizes

WAN = Sizes(pixels=(16, 16), frames_step=4, height=480, width=832, frames=81, longest=1024)
IMAGE = Sizes(pixels=(16, 16), frames_step=None, height=1024, width=1024, text=512, text_first=True)


def test_own_size_where_not_asked():
    assert WAN.chosen(None, None, 640) == (81, 480, 640)


def test_wan_grid():
    grid = WAN.grid(81, 480, 832)
    assert (grid.shape, grid.tokens) == ((21, 30, 52), 32760)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((81, 500, None), "500 16 496 512"),
        ((81, None, 8), "8 16"),
        ((80, None, None), "80 77 81"),
        ((2, None, None), "1 5"),
        ((81, None, 16 * 1025), "width 1025"),
    ],
)
def test_what_cannot_be_made(size, message):
    with pytest.raises(DitAccelError, match=names(message)):
        WAN.chosen(*size)


def test_an_image_has_one_frame():
    assert IMAGE.chosen(1, None, None) == (1, 1024, 1024)
    with pytest.raises(DitAccelError, match=names("images")):
        IMAGE.chosen(2, None, None)


def test_grid_is_what_the_accelerator_meets(cli, demo, tmp_path):
    """The grid worked out from JSON is the grid that the transformer's hook saw."""
    import json

    size = ("--frames", 5, "--height", 32, "--width", 64, "--steps", 1)
    assert cli("generate", *size, "--method", "gna:window=2", "--output", tmp_path / "a.gif").status == 0
    record = json.loads((tmp_path / "a.json").read_text())
    grid = record["grid"]
    assert list(record["report"]["grids"]) == [f"{grid['frames']}x{grid['height']}x{grid['width']}"]
