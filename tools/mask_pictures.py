"""Draw the mask of every method into docs/pictures: `python -m tools.mask_pictures`.

Static masks are exact: 6 frames of 6 x 6 tokens and 12 text tokens, for `clear` and `scaledit` one of 12 x 12.
`agent` has no mask: its picture shows tokens of such an image that share an agent.
Routed methods choose blocks by q and k: their pictures show one head of the embedded model's middle layer, at the
second of four steps. The heads are those that `dit-accel tune --calibrate 0.75 --method heads` keeps of that model from
three prompts and videos of 9 x 96 x 96 in 6 steps. For `moh` an untrained router takes heads for the tokens of one row.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import dit_accel

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
GRID = dit_accel.TokenGrid(frames=6, height=6, width=6, text=12)
IMAGE = dit_accel.TokenGrid(frames=1, height=12, width=12, text=12)
STATIC: dict[str, dict[str, Any]] = {
    "dense": {},
    "gna": {"window": 3},
    "tile": {"references": 2},
    "radial": {"decay": 1.0},
}
ROUTED: dict[str, dict[str, Any]] = {
    "sla": {"topk": 0.2, "block": 64},
    "sol": {},
    "rectified": {"gate": False},
    "sparge": {"topk": 0.1, "topp": 0.3, "block_q": 64},
    "proxy": {},
}
HEADS = ((1, 1, 0, 0), (1, 1, 1, 1), (1, 1, 1, 1), (1, 0, 0, 0), (1, 1, 0, 1), (1, 1, 1, 1))  # of each layer
MOH = {"shared": 0.25, "routed": 0.25}
LAYER, HEAD = "blocks.2.attn1", 0
SIDE = 1.848  # inches
COLOURS = ("#f2f2f2", "#9ec5e8", "#173f7a")


def called(method: str, config: dict[str, Any]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Plan, q and k of the layer's call."""
    from dit_accel.pipelines.demo import DEFAULTS, load_demo

    pipe = load_demo()
    calls = []

    def keep(call):
        if call.layer.endswith(LAYER) and call.step is not None and call.step.index == 1:
            calls.append((call.plan, call.q, call.k))

    accel = dit_accel.accelerate(pipe, method, **config)
    with accel.watch(keep):
        pipe("a red circle moves right on a blue background", **DEFAULTS.call() | {"num_inference_steps": 4})
    accel.remove()
    return calls[0]


def routed(method: str) -> torch.Tensor:
    """The blocks that a call attends exactly: bool [query blocks, key blocks]."""
    plan, q, k = called(method, ROUTED[method])
    lists = plan.route(q, k)
    rows = torch.arange(lists.indices.shape[2])[:, None]
    listed = torch.arange(lists.indices.shape[3]) < lists.counts[0, HEAD, :, None]
    chosen = torch.zeros(len(rows), plan.key_order.visual_blocks, dtype=torch.bool)
    chosen[rows.expand_as(listed)[listed], lists.indices[0, HEAD][listed].long()] = True
    return chosen


def draw(
    path: Path,
    classes: torch.Tensor,
    unit: str,
    legend: dict[int, str],
    ticks: dict[str, float],
    sides: tuple[str, str] = ("query", "key"),
) -> None:
    """Write one picture.

    Args:
        classes: int [rows, columns], indices into `COLOURS`.
        unit: of rows and columns, such as "frame".
        legend: the meaning of each class.
        ticks: labels and their places.
        sides: the meaning of rows and of columns.
    """
    from matplotlib.colors import to_rgb

    from dit_accel.plans.picture import mask_picture

    palette = torch.tensor([to_rgb(colour) for colour in COLOURS])
    meanings = {COLOURS[kind]: name for kind, name in legend.items()}
    labels = (f"{sides[0]} {unit}".strip(), f"{sides[1]} {unit}".strip())
    rows, columns = classes.shape
    pixels = palette[classes.long()].numpy()
    mask_picture(pixels, (rows, columns), meanings, labels, (SIDE, SIDE), 110, ticks).savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for mask-METHOD.png")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    frame = GRID.height * GRID.width
    ticks = {str(i): (i + 0.5) * frame - 0.5 for i in range(GRID.frames)} | {"text": GRID.visual + GRID.text / 2 - 0.5}
    for method, config in STATIC.items():
        mask = dit_accel.plan(method, GRID, **config).token_mask()
        draw(folder / f"mask-{method}.png", mask.int() * 2, "frame", {2: "attended", 0: "left out"}, ticks)
    rows = {str(i): (i + 0.5) * IMAGE.width - 0.5 for i in range(0, IMAGE.height, 3)}
    disc = dit_accel.plan("clear", IMAGE, radius=4).token_mask()
    draw(folder / "mask-clear.png", disc.int() * 2, "row", {2: "attended", 0: "left out"}, rows)
    windows = dit_accel.plan("scaledit", IMAGE, window=4, factor=2, reach=4).token_mask()
    rows |= {"anchors": IMAGE.visual + 1.5 * IMAGE.width - 0.5}
    draw(folder / "mask-scaledit.png", windows.int() * 2, "row", {2: "attended", 0: "left out"}, rows)
    tile = torch.arange(IMAGE.height) // 4
    shown = (tile[:, None] + tile) % 2 * 2
    legend = {2: "one agent", 0: "the next"}
    draw(folder / "mask-agent.png", shown, "", legend, {str(i): float(i) for i in range(0, 12, 4)}, ("row", "column"))
    computed, numbers = torch.tensor(HEADS), {str(i): float(i) for i in range(len(HEADS))}
    draw(folder / "mask-heads.png", computed * 2, "", {2: "computed", 0: "skipped"}, numbers, ("layer", "head"))
    plan, q, k = called("moh", MOH)
    row = plan.grid.height // 2 * plan.grid.width
    heads = plan.route(q, k).counts[0, :, row : row + plan.grid.width]
    numbers = {str(i): float(i) for i in range(len(heads))}
    draw(folder / "mask-moh.png", heads * 2, "", {2: "computed", 0: "skipped"}, numbers, ("head", "token"))
    for method in ROUTED:
        chosen = routed(method)
        other = {"sla": "linear", "sol": "tail", "rectified": "mean", "proxy": "mean"}.get(method)
        others = {0: "left out"} if other is None else {1: other}
        places = {str(i): float(i) for i in range(0, len(chosen), 8)}
        classes = torch.where(chosen, 2, next(iter(others)))
        draw(folder / f"mask-{method}.png", classes, "block", {2: "exact", **others}, places)


if __name__ == "__main__":
    main()
