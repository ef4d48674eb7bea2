"""Scores samples: every metric of every method, by torchmetrics, on one or several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchmetrics
from torchmetrics import CatMetric

from dit_accel.eval.metric import ChosenMetric, Scored
from dit_accel.generation import captioned
from dit_accel.generation.captioned import Captioned
from dit_accel.generation.processes import ProcessRank

Figure = dict[str, Any]  # "value"; an average over samples also has "interval" and "samples"
RESAMPLES = 2000  # of the bootstrap
CHUNK = 1 << 22  # numbers held at once


def average(values: Sequence[float], prompts: int, *, decibels: bool) -> Figure:
    """Mean, its 95 % interval (None for one prompt) and the number of samples.

    Values come prompt by prompt, equally many of each. Of `decibels` the mean squared errors are averaged.
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
    """The 95 % percentile interval of a statistic over resampled prompts, with fixed draws; None for one prompt.

    Samples of one prompt stay together, because they are not independent (Efron and Tibshirani 1993, chapter 13).
    Each of `values`, one number a sample, prompt by prompt, is an argument of the statistic, which makes [draws] from
    arrays [draws, prompts, samples of each].
    """
    if prompts < 2:
        return None
    arrays = [np.asarray(array, dtype=np.float64).reshape(prompts, -1) for array in values]
    draws = np.random.default_rng(0).integers(0, prompts, (RESAMPLES, prompts))
    parts = np.array_split(draws, -(-RESAMPLES * arrays[0].size // CHUNK))
    statistics = np.concatenate([statistic(*(array[part] for array in arrays)) for part in parts])
    low, high = np.quantile(statistics, (0.025, 0.975), method="nearest")  # no average of a number and infinity
    return float(low), float(high)


def plain(value: Any) -> Any:
    """A value for JSON, with "inf" for infinity."""
    if isinstance(value, (dict, list, tuple)):
        return {name: plain(item) for name, item in value.items()} if isinstance(value, dict) else [*map(plain, value)]
    return "inf" if value == math.inf else value


def as_tensor(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """Frames uint8 [F, H, W, 3] as float32 [F, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames).to(device).movedim(-1, 1).float() / 255


def features_of(metric: ChosenMetric, device: torch.device) -> int:
    """The number of features of a metric's network for an image."""
    return int(metric.network.features(torch.zeros(1, 3, 64, 64, device=device)).shape[1])


def score(
    metrics: Sequence[ChosenMetric],
    labels: Sequence[str],
    samples: Sequence[tuple[str, Callable[[str], np.ndarray]]],
    media: Sequence[Captioned],
    process: ProcessRank,
    device: torch.device,
) -> dict[str, tuple[dict[str, list[float]], dict[str, Figure]]]:
    """Score all methods: by label, the values of each sample by metric, and the figures.

    Torchmetrics gathers the processes' values in their order: its `CatMetric` a value per sample, its own metrics those
    of whole sets. All processes call this together. The first label is the baseline's. `samples` have their prompt and
    a function that reads a label's frames, uint8 [F, H, W, 3]; they come prompt by prompt, with equally many seeds. The
    real set is `media`, or if empty the baseline's frames.
    """
    collected: dict[tuple[str, str], torchmetrics.Metric] = {}
    for metric in metrics:
        features = 0 if metric.declared.collect is None else features_of(metric, device)
        for label in labels:
            collect = metric.declared.collect
            figure = CatMetric(nan_strategy="error").set_dtype(torch.float64) if collect is None else collect(features)
            collected[label, metric.name] = figure.to(device)
    sets = [metric for metric in metrics if metric.declared.collect is not None]
    for prompt, read in process.share(samples):
        baseline = as_tensor(read(labels[0]), device)
        real = Scored(baseline, baseline, prompt)
        for label in labels:
            sample = Scored(as_tensor(read(label), device), baseline, prompt)
            for metric in metrics:
                if metric.declared.score is not None:
                    value = metric.declared.score(sample, metric.network)
                    # as a row: torchmetrics gathers a lone scalar in another shape than several
                    collected[label, metric.name].update(torch.tensor([value], dtype=torch.float64))
                    continue
                collected[label, metric.name].update(sample.features(metric.network), real=False)
                if not media:
                    collected[label, metric.name].update(real.features(metric.network), real=True)
    for picture in process.share(media) if sets else ():
        frames = as_tensor(captioned.read_frames(picture.path), device)
        sample = Scored(frames, frames, picture.caption or "")
        for metric in sets:
            for label in labels:
                collected[label, metric.name].update(sample.features(metric.network), real=True)

    prompts = len({prompt for prompt, _ in samples})
    scored = {}
    for label in labels:
        values: dict[str, list[float]] = {}
        figures: dict[str, Figure] = {}
        for metric in metrics:
            result = torch.as_tensor(collected[label, metric.name].compute())
            if metric in sets:
                figures[metric.name] = {"value": float(result)}
                continue
            values[metric.name] = result.reshape(-1).tolist()
            figures[metric.name] = average(values[metric.name], prompts, decibels=metric.declared.decibels)
        scored[label] = values, figures
    return scored
