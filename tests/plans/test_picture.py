"""Pictures of masks with axes and a legend."""

import io

import numpy as np
import pytest
from messages import names
from PIL import Image, ImageColor

import dit_accel
from dit_accel import TokenGrid
from dit_accel.plans import picture


@pytest.mark.parametrize(("method", "config"), [("tile", {"references": 2}), ("gna", {"window": (3, 5, 7)})])
def test_the_mask_is_there_pixel_by_pixel_beside_labels(method, config):
    """Every pixel of the plain picture is one of this one, below a legend of its three colours."""
    plan = dit_accel.plan(method, TokenGrid(7, 13, 16, text=40), **config)
    figure = picture.block_picture(plan)
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("query block", "key block")
    mask = plan.block_mask()
    assert axes.get_ylim() == (mask.query_order.blocks - 0.5, -0.5)  # queries run down
    assert axes.get_xlim() == (-0.5, mask.key_order.blocks - 0.5)
    legend = axes.get_legend()
    assert {text.get_text() for text in legend.get_texts()} == set(picture.LEGEND.values())
    colours = {ImageColor.getrgb(colour) for colour in picture.LEGEND}
    assert {colour for _, colour in plan.image().getcolors()} <= colours

    file = io.BytesIO()
    figure.savefig(file, format="png")
    drawn = np.asarray(Image.open(file).convert("RGB"))
    image = np.asarray(plan.image())
    box = axes.get_window_extent()
    left, top = round(box.x0), drawn.shape[0] - round(box.y1)
    inner = (slice(2, -2), slice(2, -2))  # without the frame
    part = drawn[top : top + image.shape[0], left : left + image.shape[1]]
    differing = (part[inner] != image[inner]).any(2).mean()
    # places of the axes are rounded to whole pixels, so at most the edge of each block is off by one
    assert differing <= 2 / image.shape[0] * mask.query_order.blocks + 2 / image.shape[1] * mask.key_order.blocks


def test_what_routes_by_content_has_no_picture():
    plan = dit_accel.plan("sol", TokenGrid(7, 13, 16))
    with pytest.raises(dit_accel.DitAccelError, match=names("sol")):
        picture.block_picture(plan)
