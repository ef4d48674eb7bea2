"""Layer search: how sparse each layer can be. It makes a layer schedule for `accelerate(layer_schedule=...)`.

Each layer by itself, every other one dense, runs every candidate setting; its loss is the squared error of the model's
prediction against the dense model's, over the mean square of that, averaged over noisy samples of the training data.
From this table two schedules can be had:

* `greedy`: per layer the cheapest setting whose loss stays under a threshold, as Efficient-vDiT does
  (arXiv:2502.06155);
* `budgeted`: the least total loss for a given mean density, exactly, by dynamic programming over layers.

Both take losses of layers to add up, which is true for small ones.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.accelerator import accelerate
from dit_accel.errors import DitAccelError
from dit_accel.files import replace_file
from dit_accel.hooks import layers as layerwise
from dit_accel.hooks.layers import LayerSettings
from dit_accel.pipelines.targets import find_transformers
from dit_accel.registry import make_config
from dit_accel.train.data import Dataset
from dit_accel.train.networks import TrainingNetworks
from dit_accel.train.prepare import find_transformer
from dit_accel.train.process import process_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RESOLUTION = 1000  # parts of a dense layer in which costs are counted


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured.

    Args:
        method: name.
        candidates: settings, in any order.
        costs: density of each candidate.
        losses: [layers][candidates] relative squared error of the prediction.
    """

    method: str
    candidates: tuple[Any, ...]
    costs: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def schedule(self, chosen: Sequence[int | None]) -> LayerSettings:
        """The layer schedule of a choice: for each layer the index of a candidate, or None for dense."""
        layers = tuple(None if index is None else self.candidates[index] for index in chosen)
        return LayerSettings(self.method, {"transformer": layers})

    def cost(self, chosen: Sequence[int | None]) -> float:
        """Mean density of a choice; a dense layer counts 1."""
        return sum(1.0 if index is None else self.costs[index] for index in chosen) / len(chosen)

    def loss(self, chosen: Sequence[int | None]) -> float:
        """Sum of the layers' losses; a dense layer counts 0."""
        return sum(0.0 if index is None else self.losses[i][index] for i, index in enumerate(chosen))


def measure(
    pipe: DiffusionPipeline,
    method: str,
    candidates: Sequence[Mapping[str, Any]],
    data: Dataset,
    *,
    samples: int = 8,
    seed: int = 0,
    budget: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """Run every candidate in every layer alone.

    Args:
        pipe: the dense pipeline; it is as before afterwards.
        method: name.
        candidates: settings of the method.
        data: latents and conditioning; the first ones are used, each at a noise level of its own.
        samples: how many.
        seed: of noise and levels.
        budget: mean density to reach; checked as soon as the candidates' densities are known.
        progress: called with layers done and in all.

    Raises:
        DitAccelError: no candidates, a setting is refused, the data do not fit the model, or no candidate is as
            sparse as the budget.
    """
    if not candidates:
        raise DitAccelError("A layer search needs candidate settings, such as references=1 and references=2; got none.")
    configs = tuple(make_config(method, candidate) for candidate in candidates)
    transformer = find_transformer(pipe)
    family = find_transformers(pipe)[0]["transformer"][1]
    count = sum(1 for _ in family.attentions(transformer))
    calls = _noisy_calls(pipe, data, min(samples, len(data)), seed)
    losses = [[0.0] * len(configs) for _ in range(count)]
    costs = [0.0] * len(configs)

    @torch.no_grad()
    def predictions(settings: LayerSettings | None) -> tuple[list[torch.Tensor], float]:
        name, layer_schedule = ("dense", None) if settings is None else (None, settings)
        with accelerate(pipe, name, layer_schedule=layer_schedule, allow_dense=False) as accel:
            networks = TrainingNetworks(transformer, family, accel, lora=False)
            made = [networks.student(transformer, *call).prediction for call in calls]
            densities = [layer.density for layer in accel.report().layers if layer.density is not None]
        return made, sum(densities) / len(densities) if densities else 1.0

    dense, _ = predictions(None)
    for layer in range(count):
        for index, config in enumerate(configs):
            own = tuple(config if i == layer else None for i in range(count))
            made, costs[index] = predictions(LayerSettings(method, {"transformer": own}))
            errors = [(a - b).square().mean() / b.square().mean() for a, b in zip(made, dense, strict=True)]
            losses[layer][index] = float(torch.stack(errors).mean())
        _check_budget(costs, budget)
        progress(layer + 1, count)
    return Table(method, configs, tuple(costs), tuple(map(tuple, losses)))


def _noisy_calls(pipe: DiffusionPipeline, data: Dataset, count: int, seed: int) -> list[tuple[Any, ...]]:
    """Noisy latents, timestep and conditioning; the levels lie evenly between the middles of `count` equal parts."""
    transformer = find_transformer(pipe)
    device = next(transformer.parameters()).device
    calls = []
    for index in range(count):
        sample = data[index]
        process = process_of(pipe.scheduler, sample.latents.shape)
        noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(seed + index))
        level = process.even((index + 0.5) / count)
        noisy = process.noisy(sample.latents, noise, level)
        calls.append((noisy.to(device), process.timestep(level).to(device), sample.call))
    return calls


def greedy(table: Table, threshold: float) -> list[int | None]:
    """For each layer the cheapest candidate whose loss is at most `threshold`; None (dense) where there is none."""
    chosen: list[int | None] = []
    for row in table.losses:
        fits = [index for index, loss in enumerate(row) if loss <= threshold and table.costs[index] < 1]
        chosen.append(min(fits, key=lambda index: (table.costs[index], row[index])) if fits else None)
    return chosen


def budgeted(table: Table, budget: float) -> list[int | None]:
    """The choice with the least total loss whose mean density is at most `budget`.

    Densities are counted in thousandths, rounded up, so that the budget holds.

    Raises:
        DitAccelError: even the cheapest candidates are above the budget.
    """
    _check_budget(table.costs, budget)
    layers = len(table.losses)
    options = [(RESOLUTION, None), *((_parts(cost), i) for i, cost in enumerate(table.costs))]
    room = int(budget * RESOLUTION * layers + 1e-6)
    least = torch.full(
        (room + 1,), float("inf"), dtype=torch.float64
    )  # least[c]: least loss of layers so far at cost c
    least[0] = 0
    taken: list[torch.Tensor] = []
    for row in table.losses:
        best, pick = torch.full_like(least, float("inf")), torch.full((room + 1,), -1)
        for option, (cost, index) in enumerate(options):
            if cost > room:
                continue
            moved = least[: room + 1 - cost] + (0.0 if index is None else row[index])
            better = moved < best[cost:]
            best[cost:] = torch.where(better, moved, best[cost:])
            pick[cost:] = torch.where(better, option, pick[cost:])
        least = best
        taken.append(pick)
    place = int(least.argmin())
    chosen: list[int | None] = []
    for pick in reversed(taken):
        cost, index = options[int(pick[place])]
        chosen.append(index)
        place -= cost
    return chosen[::-1]


def _check_budget(costs: Sequence[float], budget: float) -> None:
    if _parts(min(costs)) > budget * RESOLUTION + 1e-6:
        raise DitAccelError(
            f"A mean density of {budget} is out of reach: the sparsest candidate has {min(costs):.4f}. Add sparser "
            "candidates or raise the budget."
        )


def _parts(density: float) -> int:
    return -int(-density * RESOLUTION // 1)


def write(path: pathlib.Path, table: Table, chosen: Sequence[int | None], **remarks: Any) -> LayerSettings:
    """Write the layer schedule with what it was chosen from.

    Raises:
        DitAccelError: the file cannot be written.
    """
    settings = table.schedule(chosen)
    found = {"density": table.cost(chosen), "loss": table.loss(chosen), "costs": table.costs, "losses": table.losses}
    replace_file(path, layerwise.to_json(settings, search={**remarks, **found}).encode())
    return settings
