"""Metrics: their declaration, and the choice among them by name.

Each file of `dit_accel.eval.metrics` declares `METRICS`; nothing else lists them. A metric's name is ``psnr`` or, with
a network, ``fid[demo-clip]``. The printed name omits the network that the metric was published with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torchmetrics

from dit_accel.errors import DitAccelError
from dit_accel.eval.networks import DEMO_CLIP, Networks, installed
from dit_accel.registry import declared, did_you_mean


class Scored:
    """A sample to score; each network sees it once.

    Args:
        frames: float32 [F, 3, H, W] in [0, 1].
        baseline: the untouched pipeline's frames of the same prompt and seed, of the same shape.
    """

    def __init__(self, frames: torch.Tensor, baseline: torch.Tensor, prompt: str) -> None:
        self.frames, self.baseline, self.prompt = frames, baseline, prompt
        self._seen: dict[tuple[int, str], torch.Tensor] = {}

    def features(self, network: Any, tower: str = "features") -> torch.Tensor:
        """The frames' vectors by the network's method `tower`, [F, D]."""
        key = id(network), tower
        if key not in self._seen:
            self._seen[key] = getattr(network, tower)(self.frames)
        return self._seen[key]


def paired(name: str, frames: torch.Tensor, baseline: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and baseline in float32 for a metric of that name; ValueError if their shapes differ."""
    if frames.shape != baseline.shape:
        raise ValueError(f"{name} compares equal shapes, got {tuple(frames.shape)} and {tuple(baseline.shape)}.")
    return frames.float(), baseline.float()


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric before its network is chosen; declared among the `METRICS` of a file of `dit_accel.eval.metrics`.

    Args:
        name: as typed.
        title, unit: as printed.
        better: the direction of good values.
        about: its definition in one line.
        order: its place in tables, then by name.
        score: the value of one sample, from the sample and the network; None for a metric of whole sets.
        collect: for a metric of whole sets, a torchmetrics metric for that many features. Its `update(features, real)`
            takes [N, D]; its `compute` raises `TooFew` for sets that are too small.
        least: images that a set of that many features needs for a number.
        enough: images that it needs for a meaningful number; with fewer the metric is measured only by name.
        network: loads the network of a source, or the usual one for None; None without a network.
        published: the network that the metric's plain name means; None: the printed name always has the network.
        packages: of the usual network.
        default: whether it is measured without being named: "always"; "published", with all usual networks; "embedded",
            with the embedded CLIP; "demo", for the embedded model.
        video: it compares neighbouring frames, so an image has no value.
        decibels: mean squared errors are averaged, not decibels.
    """

    name: str
    title: str
    better: Literal["higher", "lower"]
    about: str
    order: int
    unit: str = ""
    score: Callable[[Scored, Any], float] | None = None
    collect: Callable[[int], torchmetrics.Metric] | None = None
    least: Callable[[int], int] = lambda features: 1
    enough: Callable[[int], int] = lambda features: 1
    network: Callable[[Networks, str | None], Any] | None = None
    published: str | None = None
    packages: tuple[str, ...] = ()
    default: Literal["always", "published", "embedded", "demo"] = "always"
    video: bool = False
    decibels: bool = False


class TooFew(DitAccelError):
    """A set has too few images for a number; the message has the number needed."""


@dataclasses.dataclass(frozen=True)
class ChosenMetric:
    """A metric with its network, ready to score.

    Args:
        name: as printed.
        network: loaded, or None.
        named: it was named, so it must not be left out.
    """

    name: str
    declared: Metric
    network: Any
    named: bool

    def about(self) -> dict[str, str]:
        """Its entry in a report."""
        metric = self.declared
        title = metric.title if self.name == metric.name else f"{metric.title} [{self.network.name}]"
        return {"name": self.name, "title": title, "unit": metric.unit, "better": metric.better, "about": metric.about}


def known() -> dict[str, Metric]:
    """Every metric by name, in the order of tables."""
    metrics = itertools.chain(*declared("eval.metrics", "METRICS"))
    return {metric.name: metric for metric in sorted(metrics, key=lambda metric: (metric.order, metric.name))}


def parse(text: str) -> tuple[str, str | None]:
    """Read ``name`` or ``name[network]``."""
    name, bracket, rest = text.partition("[")
    if name not in (names := sorted(known())):
        raise DitAccelError(f"Unknown metric {text!r}.{did_you_mean(name, names)} Metrics: {', '.join(names)}.")
    if not bracket:
        return name, None
    if not rest.endswith("]") or len(rest) < 2:
        raise DitAccelError(f"A metric is written name or name[network], such as fid[{DEMO_CLIP}]; got {text!r}.")
    return name, rest[:-1]


def defaults(embedded: bool) -> list[tuple[Metric, str | None]]:
    """The metrics to measure if none is named, each with its network's source, in order.

    They use the embedded CLIP if the model is embedded or a package of the usual networks is missing.
    """
    every = known().values()
    published = [metric for metric in every if metric.default in ("always", "published")]
    if not embedded and all(installed(metric.packages) for metric in published):
        return [(metric, None) for metric in published]
    return [
        (metric, None if metric.network is None else DEMO_CLIP)
        for metric in every
        if metric.default in ("always", "embedded") or (embedded and metric.default == "demo")
    ]


def choose(texts: Iterable[str], embedded: bool, frames: int, device: torch.device) -> list[ChosenMetric]:
    """The metrics that `texts` name, or the `defaults`, with their networks loaded.

    Samples of one frame go without metrics of neighbouring frames.

    Raises:
        DitAccelError: a metric is unknown or named twice, its packages are missing, or its network cannot load.
    """
    named = [parse(text) for text in texts]
    networks = Networks(device)
    chosen: list[ChosenMetric] = []
    for metric, source in [(known()[name], source) for name, source in named] or defaults(embedded):
        if metric.video and frames == 1:
            if named:
                raise DitAccelError(f"{metric.name} compares neighbouring frames. Leave it out for an image model.")
            continue
        if metric.default == "demo" and not embedded:
            raise DitAccelError(
                f"{metric.name} reads only what the embedded model draws. Leave it out for other models."
            )
        if metric.network is None and source is not None:
            raise DitAccelError(f"{metric.name} has no network. Write it without [{source}].")
        network: Any = None if metric.network is None else metric.network(networks, source)
        plain = metric.network is None or network.name == metric.published
        printed = metric.name if plain else f"{metric.name}[{network.name}]"
        if any(other.name == printed for other in chosen):
            raise DitAccelError(f"{printed} is listed twice. Leave one out.")
        chosen.append(ChosenMetric(printed, metric, network, named=bool(named)))
    return chosen
