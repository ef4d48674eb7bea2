"""A mask as a picture with axes and a legend, drawn by matplotlib, for `dit-accel plan --image` and the documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dit_accel.plans.plan import Plan

LEFT, RIGHT, BOTTOM, TOP = 0.48, 0.072, 0.405, 0.447  # inches around the mask, for labels and legend
SIDE = 4.65  # inches of the longer side of a plan's mask
LEGEND = {"#173f7a": "computed whole", "#78aadc": "computed in part", "#fafafa": "not computed"}  # of `Plan.image`


def block_picture(plan: Plan) -> Figure:
    """The picture of a plan's block mask, each pixel of `Plan.image` one pixel; errors as there."""
    image = plan.image()
    mask = plan.block_mask()
    dpi = max(image.size) / SIDE
    shape = (mask.query_order.blocks, mask.key_order.blocks)
    return mask_picture(
        image, shape, LEGEND, ("query block", "key block"), (image.height / dpi, image.width / dpi), dpi
    )


def mask_picture(
    pixels: Any,
    shape: tuple[int, int],
    legend: Mapping[str, str],
    sides: tuple[str, str],
    size: tuple[float, float],
    dpi: float,
    ticks: Mapping[str, float] | None = None,
) -> Figure:
    """Draw one mask.

    Args:
        pixels: what matplotlib takes as a picture: one of PIL's, or uint8 [rows, columns, 3].
        shape: rows and columns, which the axes count.
        legend: the meaning of each colour.
        sides: the meaning of rows and of columns, such as "query block".
        size: height and width of the mask in inches.
        ticks: labels and their places, on either side that is long enough; None: numbers.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = size[0] + BOTTOM + TOP, size[1] + LEFT + RIGHT
    figure = Figure(figsize=(width, height), dpi=dpi)
    axes = figure.add_axes((LEFT / width, BOTTOM / height, size[1] / width, size[0] / height))
    rows, columns = shape
    axes.imshow(pixels, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), interpolation="nearest", aspect="auto")
    axes.set_ylabel(sides[0], fontsize=8)
    axes.set_xlabel(sides[1], fontsize=8)
    if ticks is not None:
        for show, count in ((axes.set_yticks, rows), (axes.set_xticks, columns)):
            within = {name: place for name, place in ticks.items() if place < count}
            show(list(within.values()), list(within))
    axes.tick_params(length=0, labelsize=7)
    patches = [Patch(facecolor=colour, edgecolor="#888888", label=meaning) for colour, meaning in legend.items()]
    axes.legend(
        handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(patches), fontsize=7, frameon=False,
        handlelength=1, columnspacing=1,
    )  # fmt: skip
    return figure
