"""From samples to figures: every metric of every method, by torchmetrics, on one process or on several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics import CatMetric

from dit_accel.eval.metric import ChosenMetric, Scored
from dit_accel.generation import captioned
from dit_accel.generation.captioned import Captioned
from dit_accel.generation.processes import Process

if TYPE_CHECKING:
    import torchmetrics

Figure = dict[str, Any]  # "value"; "interval" and "samples" where it is an average over samples
RESAMPLES = 2000  # of the bootstrap
CHUNK = 1 << 22  # numbers held at once


class Scorer:
    """Accumulates the metrics of several methods.

    A value per sample is kept by torchmetrics' `CatMetric`; a metric of whole sets is its own. Torchmetrics gathers
    both from all processes, in the order of the processes.

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
                if metric.declared.collect is None:
                    values = CatMetric(nan_strategy="error").set_dtype(torch.float64)
                    self._values[metric.name, label] = values.to(device)
                else:
                    collected = metric.declared.collect(features_of(metric, device))
                    self._sets[metric.name, label] = collected.to(device)

    def add(self, prompt: str, frames: Mapping[str, np.ndarray], baseline: np.ndarray, *, compare_sets: bool) -> None:
        """Score one prompt and seed.

        Args:
            prompt: what the samples should show.
            frames: of each method, uint8 [F, H, W, 3].
            baseline: the untouched pipeline's frames of the same prompt and seed.
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
        return {
            metric.name: torch.as_tensor(self._values[metric.name, label].compute()).reshape(-1).tolist()
            for metric in self.metrics
            if (metric.name, label) in self._values
        }

    def figures(self, label: str, values: Mapping[str, Sequence[float]], prompts: int) -> dict[str, Figure]:
        """The figure of each metric, from what `values` gave; all processes call this together."""
        return {
            metric.name: average(values[metric.name], prompts, decibels=metric.declared.decibels)
            if metric.name in values
            else {"value": float(self._sets[metric.name, label].compute())}
            for metric in self.metrics
        }


def average(values: Sequence[float], prompts: int, *, decibels: bool) -> Figure:
    """Mean, its 95 % interval (None for one prompt) and the number of samples.

    Args:
        values: one for each sample, prompt by prompt, as many of each.
        prompts: how many there are.
        decibels: the mean is that of the mean squared errors, as if all samples were one.
    """
    single = [10 ** (-value / 10) for value in values] if decibels else values
    mean = math.fsum(single) / len(values)
    interval = bootstrap(lambda drawn: drawn.mean((-1, -2)), prompts, single)
    if decibels:
        mean = _decibels(mean)
        interval = interval and (_decibels(interval[1]), _decibels(interval[0]))
    return {"value": mean, "interval": interval, "samples": len(values)}


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf


def bootstrap(
    statistic: Callable[..., np.ndarray], prompts: int, *values: Sequence[float] | np.ndarray
) -> tuple[float, float] | None:
    """The percentile interval of 95 % of a statistic when the prompts are drawn again, always the same way.

    Samples of one prompt stay together, because they are not independent (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistic: from arrays [draws, prompts, samples of each] to [draws].
        prompts: how many there are; one has no interval.
        values: for each argument of the statistic, one number a sample, prompt by prompt.
    """
    if prompts < 2:
        return None
    arrays = [np.asarray(each, dtype=np.float64).reshape(prompts, -1) for each in values]
    draws = np.random.default_rng(0).integers(0, prompts, (RESAMPLES, prompts))
    parts = np.array_split(draws, -(-RESAMPLES * arrays[0].size // CHUNK))
    found = np.concatenate([statistic(*(array[part] for array in arrays)) for part in parts])
    low, high = np.quantile(found, (0.025, 0.975), method="nearest")  # no average of a number and infinity
    return float(low), float(high)


def plain(value: Any) -> Any:
    """A value for JSON, which knows no infinity: that is the word "inf"."""
    if isinstance(value, (dict, list, tuple)):
        return {name: plain(item) for name, item in value.items()} if isinstance(value, dict) else [*map(plain, value)]
    return "inf" if value == math.inf else value


def as_tensor(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """Frames uint8 [F, H, W, 3] as float32 [F, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames).to(device).movedim(-1, 1).float() / 255


def features_of(metric: ChosenMetric, device: torch.device) -> int:
    """How many features the network of a metric gives for an image."""
    return int(metric.network.features(torch.zeros(1, 3, 64, 64, device=device)).shape[1])


def score(
    metrics: Sequence[ChosenMetric],
    labels: Sequence[str],
    samples: Sequence[tuple[str, Callable[[str], np.ndarray]]],
    media: Sequence[Captioned],
    process: Process,
    device: torch.device,
) -> dict[str, tuple[dict[str, list[float]], dict[str, Figure]]]:
    """Score all methods.

    Args:
        metrics: to score.
        labels: of the methods, the baseline first.
        samples: the prompt of each, and what reads the frames of a label; prompt by prompt, with as many seeds each.
        media: the real set; if empty, it is the baseline's frames.
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
    prompts = len({prompt for prompt, _ in samples})
    found = {}
    for label in labels:
        values = scorer.values(label)
        found[label] = values, scorer.figures(label, values, prompts)
    return found
