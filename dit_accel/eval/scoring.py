"""From samples to figures: every metric of every method, by torchmetrics, on one process or on several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import CatMetric

from dit_accel.eval.metric import ChosenMetric, Scored, TooFew
from dit_accel.generation import captioned
from dit_accel.generation.captioned import Captioned
from dit_accel.generation.processes import Process

if TYPE_CHECKING:
    import numpy as np
    import torchmetrics

Figure = dict[str, Any]


class Scorer:
    """Accumulates the metrics of several methods.

    A value per sample is kept by torchmetrics' `CatMetric`; a metric of whole sets is its own. Both are brought
    together from all processes by torchmetrics, in the order of the processes.

    Args:
        metrics: to score.
        labels: of the methods.
        device: where networks and sums are.
    """

    def __init__(self, metrics: Sequence[ChosenMetric], labels: Sequence[str], device: torch.device) -> None:
        self.metrics, self.labels, self.device = metrics, labels, device
        self._values: dict[tuple[str, str], CatMetric] = {}
        self._sets: dict[tuple[str, str], torchmetrics.Metric] = {}
        for metric in metrics:
            for label in labels:
                if metric.declared.score is not None:
                    values = CatMetric(nan_strategy="error").set_dtype(torch.float64)
                    self._values[metric.name, label] = values.to(device)
                else:
                    assert metric.declared.collect is not None
                    collected = metric.declared.collect(features_of(metric, device))
                    self._sets[metric.name, label] = collected.to(device)

    def add(self, prompt: str, frames: Mapping[str, np.ndarray], baseline: np.ndarray, *, compare_sets: bool) -> None:
        """Score one prompt and seed.

        Args:
            prompt: what was asked for.
            frames: of each method, uint8 [F, H, W, 3].
            baseline: frames of the same prompt and seed.
            compare_sets: whether the baseline's frames are the real set too.
        """
        goal = as_tensor(baseline, self.device)
        real = Scored(goal, goal, prompt)
        for label in self.labels:
            sample = Scored(as_tensor(frames[label], self.device), goal, prompt)
            for metric in self.metrics:
                if metric.declared.score is not None:
                    value = metric.declared.score(sample, metric.network)
                    # In a row: torchmetrics gathers a lone scalar in another shape than several.
                    self._values[metric.name, label].update(torch.tensor([value], dtype=torch.float64))
                    continue
                collected = self._sets[metric.name, label]
                collected.update(sample.features(metric.network), real=False)
                if compare_sets:
                    collected.update(real.features(metric.network), real=True)

    def add_real_set(self, media: Iterable[Captioned]) -> None:
        """Make images and videos the set that distributions are compared with."""
        sets = [metric for metric in self.metrics if metric.declared.collect is not None]
        for found in media if sets else ():
            frames = as_tensor(captioned.read_frames(found.path), self.device)
            sample = Scored(frames, frames, found.caption or "")
            for metric in sets:
                for label in self.labels:
                    self._sets[metric.name, label].update(sample.features(metric.network), real=True)

    def values(self, label: str) -> dict[str, list[float]]:
        """The value of each sample, by metric, in the order of the samples; all processes call this together."""
        found = {}
        for metric in self.metrics:
            if (metric.name, label) in self._values:
                found[metric.name] = torch.as_tensor(self._values[metric.name, label].compute()).reshape(-1).tolist()
        return found

    def figures(self, label: str, values: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
        """The figure of each metric, from what `values` gave; all processes call this together."""
        figures = {}
        for metric in self.metrics:
            if metric.name in values:
                figures[metric.name] = summary(values[metric.name], decibels=metric.declared.decibels)
                continue
            try:
                figures[metric.name] = {"value": float(self._sets[metric.name, label].compute()), "spread": None}
            except TooFew as error:
                figures[metric.name] = {"value": None, "missing": str(error)}
        return figures


def summary(values: Sequence[float], *, decibels: bool) -> Figure:
    """Mean, standard deviation (None for one value, or where one is infinite) and number of samples.

    Args:
        values: one for each sample.
        decibels: the mean is that of the mean squared errors, as if all samples were one.
    """
    if decibels:
        error = math.fsum(10 ** (-value / 10) for value in values) / len(values)
        mean = -10 * math.log10(error) if error > 0 else math.inf
    else:
        mean = math.fsum(values) / len(values)
    finite = len(values) > 1 and all(map(math.isfinite, values))
    spread = torch.tensor(values, dtype=torch.float64).std().item() if finite else None
    return {"value": mean, "spread": spread, "samples": len(values)}


def plain(value: float) -> float | str:
    """A value for JSON, which knows no infinity: that is the word "inf"."""
    return "inf" if value == math.inf else value


def as_tensor(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """Frames uint8 [F, H, W, 3] as float32 [F, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames).to(device).movedim(-1, 1).float() / 255


def features_of(metric: ChosenMetric, device: torch.device) -> int:
    """How many features the network of a metric gives for an image."""
    return int(metric.network.features(torch.zeros(1, 3, 64, 64, device=device)).shape[1])


Frames = Callable[[str], "np.ndarray"]


def score(
    metrics: Sequence[ChosenMetric],
    labels: Sequence[str],
    samples: Sequence[tuple[str, Frames]],
    media: Sequence[Captioned],
    process: Process,
    device: torch.device,
) -> dict[str, tuple[dict[str, list[float]], dict[str, Figure]]]:
    """Score all methods.

    Args:
        metrics: to score.
        labels: of the methods, the baseline first.
        samples: of all prompts and seeds: the prompt, and what reads the frames of a label.
        media: the real set; if empty, the baseline's own frames are it.
        process: whose share of the work is done here; torchmetrics adds up those of all.
        device: where the networks run.

    Returns:
        By label: the values of each sample by metric, and the figures.
    """
    scorer = Scorer(metrics, labels, device)
    for prompt, read in process.share(samples):
        frames = {label: read(label) for label in labels}
        scorer.add(prompt, frames, frames[labels[0]], compare_sets=not media)
    scorer.add_real_set(process.share(media))
    found = {}
    for label in labels:
        values = scorer.values(label)
        found[label] = values, scorer.figures(label, values)
    return found
