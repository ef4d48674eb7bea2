"""How unevenly Ulysses shares a routed method's heads, simulated from densities that the embedded model had.

`head_densities.json` has the share of visual pairs that each head kept in each step, recorded by
`python -m tools.demo.head_densities`. The embedded model has few heads. So a layer of more heads is drawn from the
heads of all its layers and prompts, each with its own course over the steps.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

from dit_accel.files import read_json
from dit_accel.plans.head_balance import over_steps

RECORD = Path(__file__).with_name("head_densities.json")
GPUS = (2, 4, 8)
LAYERS = 200  # drawn


@functools.cache
def recorded() -> dict[str, list[list[float]]]:
    """By setting, the densities of heads, [heads, steps]."""
    densities: dict[str, list[list[float]]] = read_json(RECORD, "record of densities", "Install the package again.")[
        "densities"
    ]
    return densities


@functools.cache
def simulated(setting: str, heads: int, gpus: int) -> tuple[float, float]:
    """Largest over mean number of pairs of a GPU: with heads in order, and given by their pairs of the last step.

    The mean over drawn layers and over steps.

    Args:
        setting: a key of `recorded`.
        heads: of a layer, at least as many as GPUs.
    """
    source, draw = recorded()[setting], random.Random(0)
    layers = [list(zip(*draw.choices(source, k=heads), strict=True)) for _ in range(LAYERS)]
    imbalances = [over_steps(layer, gpus) for layer in layers]
    before, after = (sum(values) / LAYERS for values in zip(*imbalances, strict=True))
    return before, after


def of_method(method: str, heads: int) -> dict[int, tuple[float, float]]:
    """`simulated` by number of GPUs, at the method's defaults; empty where all heads keep equally many."""
    return {gpus: simulated(method, heads, gpus) for gpus in GPUS if method in recorded() and gpus <= heads}
