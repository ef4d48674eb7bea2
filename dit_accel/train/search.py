"""Layer search: makes a layer schedule for `accelerate(layer_schedule=...)`.

Every candidate setting runs in each layer alone, with the other layers dense. Its loss is the squared error of the
prediction over the mean square of the dense model's, averaged over noisy training samples. Two schedules follow:

* `greedy`: per layer the cheapest setting with a loss under a threshold, as in Efficient-vDiT (arXiv:2502.06155);
* `budgeted`: the least total loss at a given mean density, exactly, by dynamic programming over layers.

Both add up the losses of layers, which holds for small losses. Settings that share results between denoising steps run
the steps from a refresh to the last step before the next; the loss is that of the last, and the cost the mean of all.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dit_accel.accelerator import accelerate
from dit_accel.errors import DitAccelError
from dit_accel.files import replace_file
from dit_accel.pipelines.targets import find_transformers
from dit_accel.registry import DENSE
from dit_accel.setting import Layers, Setting
from dit_accel.train.data import Dataset
from dit_accel.train.networks import TrainingNetworks
from dit_accel.train.prepare import find_transformer
from dit_accel.train.process import process_of

LAST = 0.999  # share of a scheduler's levels that the noisiest sample has
RESOLUTION = 1000  # costs are counted in parts of a dense layer


@dataclasses.dataclass(frozen=True)
class Table:
    """The measured losses.

    Args:
        candidates: settings, in any order.
        costs: density of each candidate.
        losses: [layers][candidates] relative squared error of the prediction.
    """

    method: str
    candidates: tuple[Any, ...]
    costs: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def cost(self, chosen: Sequence[int | None]) -> float:
        """Mean density of a choice: for each layer the index of a candidate, or None for dense, which counts 1."""
        return sum(1.0 if index is None else self.costs[index] for index in chosen) / len(chosen)

    def layers(self, chosen: Sequence[int | None]) -> Layers:
        """The choice as the layers of a `Setting`."""
        return {"transformer": tuple(None if index is None else self.candidates[index] for index in chosen)}

    def loss(self, chosen: Sequence[int | None]) -> float:
        """Sum of the layers' losses; a dense layer counts 0."""
        return sum(0.0 if index is None else self.losses[i][index] for i, index in enumerate(chosen))


def measure(
    pipe: DiffusionPipeline,
    method: str,
    candidates: Sequence[Any],
    data: Dataset,
    *,
    samples: int = 8,
    seed: int = 0,
    budget: float = 1.0,
    steps: int = 50,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """Run every candidate in every layer alone.

    Args:
        pipe: the dense pipeline, which stays dense.
        candidates: Configs of the method.
        data: its first `samples` samples are used, each at its own noise level.
        budget: mean density to reach, checked after the first layer.
        steps: of a whole run, which tell how much noise lies between two.
        progress: called with the layers done and the number of layers.

    Raises:
        DitAccelError: there are no candidates, the data do not fit the model, or no candidate is as sparse as the
            budget.
    """
    if not candidates:
        raise DitAccelError("A layer search needs candidate settings, such as references=1 and references=2; got none.")
    probe = Probe(pipe, method, data, samples, seed, steps)
    losses = [[0.0] * len(candidates) for _ in range(probe.layers)]
    costs = [0.0] * len(candidates)
    for layer in range(probe.layers):
        for index, config in enumerate(candidates):
            losses[layer][index], costs[index] = probe.measure(layer, config)
        _check_budget(costs, budget)
        progress(layer + 1, probe.layers)
    return Table(method, tuple(candidates), tuple(costs), tuple(map(tuple, losses)))


class Probe:
    """Measures settings in one of the `layers`, with the others dense; the arguments are those of `measure`."""

    def __init__(
        self, pipe: DiffusionPipeline, method: str, data: Dataset, samples: int, seed: int = 0, steps: int = 50
    ) -> None:
        self.pipe, self.method, self.transformer = pipe, method, find_transformer(pipe)
        self.family = find_transformers(pipe)[0]["transformer"][1]
        self.layers = sum(1 for _ in self.family.attentions(self.transformer))
        self._data, self._count, self._seed, self._steps = data, min(samples, len(data)), seed, steps
        self.dense, _ = self._predictions(Setting.make(DENSE), 1)

    def measure(self, layer: int, config: Any) -> tuple[float, float]:
        """Loss and density of a layer's settings."""
        row = tuple(config if i == layer else None for i in range(self.layers))
        setting = Setting(self.method, layers={"transformer": row})
        predictions, density = self._predictions(setting, config.refresh)
        errors = [(a - b).square().mean() / b.square().mean() for a, b in zip(predictions, self.dense, strict=True)]
        return float(torch.stack(errors).mean()), density

    @torch.no_grad()
    def _predictions(self, setting: Setting, refresh: int) -> tuple[list[torch.Tensor], float]:
        runs = zip(*(self._calls((refresh - 1 - step) / self._steps) for step in range(refresh)), strict=True)
        predictions = []
        with accelerate(self.pipe, setting) as accel:
            networks = TrainingNetworks(self.transformer, self.family, accel, lora=False)
            for run in runs:
                for step, call in enumerate(run):
                    accel.set_step(step, refresh)
                    outputs = networks.outputs(self.transformer, *call)
                predictions.append(outputs.prediction)
            densities = [layer.density for layer in accel.report().layers if layer.density is not None]
        return predictions, sum(densities) / len(densities) if densities else 1.0

    def _calls(self, before: float) -> list[tuple[Any, ...]]:
        """Noisy latents, timestep and conditioning.

        The levels are the middles of equal parts, one a sample, and of a share of a run `before` them.
        """
        device = next(self.transformer.parameters()).device
        calls = []
        for index in range(self._count):
            sample = self._data[index]
            process = process_of(self.pipe.scheduler, sample.latents.shape)
            noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(self._seed + index))
            level = process.even(min((index + 0.5) / self._count + before, LAST))
            noisy = process.noisy(sample.latents, noise, level)
            calls.append((noisy.to(device), process.timestep(level).to(device), sample.call))
        return calls


def greedy(table: Table, threshold: float) -> list[int | None]:
    """For each layer the cheapest candidate with a loss of at most `threshold`; None (dense) without one."""
    chosen: list[int | None] = []
    for row in table.losses:
        fits = [index for index, loss in enumerate(row) if loss <= threshold and table.costs[index] < 1]
        chosen.append(min(fits, key=lambda index: (table.costs[index], row[index])) if fits else None)
    return chosen


def budgeted(table: Table, budget: float) -> list[int | None]:
    """The choice with the least total loss at a mean density of at most `budget`.

    Densities are rounded up to thousandths, so the budget holds.
    """
    _check_budget(table.costs, budget)
    layers = len(table.losses)
    options = [(RESOLUTION, None), *((_parts(cost), i) for i, cost in enumerate(table.costs))]
    room = int(budget * RESOLUTION * layers + 1e-6)
    least = torch.full((room + 1,), float("inf"), dtype=torch.float64)  # least loss of the layers so far, by cost
    least[0] = 0
    picks: list[torch.Tensor] = []
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
        picks.append(pick)
    place = int(least.argmin())
    chosen: list[int | None] = []
    for pick in reversed(picks):
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


def write(
    path: pathlib.Path, table: Table, chosen: Sequence[int | None], setting: Setting, remarks: Mapping[str, Any]
) -> None:
    """Write the chosen setting with remarks and the table that it was chosen from."""
    figures = {"density": table.cost(chosen), "loss": table.loss(chosen), "costs": table.costs, "losses": table.losses}
    replace_file(path, setting.to_json(search={**remarks, **figures}).encode())
