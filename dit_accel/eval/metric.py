"""What a metric is, and how metrics are found and asked for.

Each file of `dit_accel.eval.metrics` declares one metric under the name `METRIC`; nothing else lists them. A metric is
asked for as ``psnr`` or, where a network decides its value, as ``fid[demo-clip]``. Its printed name says the network,
save for the network that the metric was published with.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from dit_accel.errors import DitAccelError
from dit_accel.eval import metrics
from dit_accel.eval.networks import DEMO_CLIP, Networks, installed
from dit_accel.registry import did_you_mean

if TYPE_CHECKING:
    import torch
    import torchmetrics


class Scored:
    """What one sample is scored on; each network sees it once.

    Args:
        frames: float32 [F, 3, H, W] in [0, 1].
        baseline: the untouched pipeline's frames of the same prompt and seed, of the same shape.
        prompt: what the sample should show.
    """

    def __init__(self, frames: torch.Tensor, baseline: torch.Tensor, prompt: str) -> None:
        self.frames, self.baseline, self.prompt = frames, baseline, prompt
        self._seen: dict[tuple[int, str], torch.Tensor] = {}

    def features(self, network: Any, tower: str = "features") -> torch.Tensor:
        """The frames' vectors by a method of the network, [F, D]."""
        key = id(network), tower
        if key not in self._seen:
            self._seen[key] = getattr(network, tower)(self.frames)
        return self._seen[key]

    def images(self, clip: Any) -> torch.Tensor:
        """The frames in the space that CLIP shares with texts, [F, D]."""
        return self.features(clip, "images")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric before its network is chosen; a file of `dit_accel.eval.metrics` declares one as `METRIC`.

    Args:
        name: the name of its file.
        title, unit: for people.
        better: which values are good.
        about: how it is made, in one line.
        order: its place in tables; metrics with the same one stand by name.
        score: the value of one sample, from the sample and the network; None for a metric of whole sets.
        collect: for a metric of whole sets, a torchmetrics metric for that many features. Its `update(features, real)`
            takes [N, D]; its `compute` raises `TooFew` where there are too few images for a number.
        least: images a set needs for that many features; with fewer there is no number.
        enough: images a set needs for a number that means something; with fewer it is measured only if asked for.
        network: loads the network of a source, or the usual one for None; None if the metric needs no network.
        published: name of the network that the metric's plain name stands for; None if its printed name always says it.
        packages: what the usual network needs.
        default: when it is measured although nobody asked: "always"; "published", only with all usual networks;
            "embedded", only with the embedded CLIP; "never".
        video: it compares neighbouring frames, so a single image has none.
        decibels: averaged as mean squared errors, not as decibels.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    about: str
    order: int
    score: Callable[[Scored, Any], float] | None = None
    collect: Callable[[int], torchmetrics.Metric] | None = None
    least: Callable[[int], int] = lambda features: 1
    enough: Callable[[int], int] = lambda features: 1
    network: Callable[[Networks, str | None], Any] | None = None
    published: str | None = None
    packages: tuple[str, ...] = ()
    default: Literal["always", "published", "embedded", "never"] = "always"
    video: bool = False
    decibels: bool = False


class TooFew(DitAccelError):
    """A set has too few images for a number; the message says how many are needed."""


@dataclasses.dataclass(frozen=True)
class ChosenMetric:
    """A metric with its network, ready to score.

    Args:
        name: the one to print.
        declared: what it is.
        network: loaded, or None.
        asked: whether somebody asked for it by name, so that leaving it out would be wrong.
    """

    name: str
    declared: Metric
    network: Any
    asked: bool

    def about(self) -> dict[str, str]:
        """For a report."""
        own = self.declared
        title = own.title if self.name == own.name else f"{own.title} [{self.network.name}]"
        return {"name": self.name, "title": title, "unit": own.unit, "better": own.better, "about": own.about}


def names() -> list[str]:
    """Names of all metrics: their files', sorted; none is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(metrics.__path__))


def get(name: str) -> Metric:
    """The metric of that name, which is one of `names`."""
    found: Metric = importlib.import_module(f"{metrics.__name__}.{name}").METRIC
    return found


def parse(text: str) -> tuple[str, str | None]:
    """Read ``name`` or ``name[network]``.

    Raises:
        DitAccelError: there is no such metric; the message suggests the nearest.
    """
    name, bracket, rest = text.partition("[")
    known = names()
    if name not in known:
        raise DitAccelError(f"Unknown metric {text!r}.{did_you_mean(name, known)} Metrics: {', '.join(known)}.")
    if not bracket:
        return name, None
    if not rest.endswith("]") or len(rest) < 2:
        raise DitAccelError(f"A metric is written name or name[network], such as fid[{DEMO_CLIP}]; got {text!r}.")
    return name, rest[:-1]


def defaults(embedded: bool) -> list[tuple[Metric, str | None]]:
    """The metrics to measure when none is asked for, each with its network's source, in order.

    Args:
        embedded: whether the model is. Its metrics look through the embedded CLIP, as they do where a package of the
            usual networks is missing.
    """
    known = sorted(map(get, names()), key=lambda metric: (metric.order, metric.name))
    published = [metric for metric in known if metric.default in ("always", "published")]
    if not embedded and all(installed(metric.packages) for metric in published):
        return [(metric, None) for metric in published]
    return [
        (metric, None if metric.network is None else DEMO_CLIP)
        for metric in known
        if metric.default in ("always", "embedded")
    ]


def choose(asked: Iterable[str], embedded: bool, frames: int, device: torch.device) -> list[ChosenMetric]:
    """The metrics that were asked for, or the `defaults`, with their networks loaded.

    Args:
        asked: as typed; empty for the defaults.
        embedded: whether the model is.
        frames: of each sample; 1 leaves out what compares neighbouring frames.
        device: where the networks run.

    Raises:
        DitAccelError: a metric is unknown or asked for twice, its packages are missing, or its network cannot load.
    """
    named = [parse(text) for text in asked]
    networks = Networks(device)
    chosen: list[ChosenMetric] = []
    for metric, source in [(get(name), source) for name, source in named] or defaults(embedded):
        if metric.video and frames == 1:
            if named:
                raise DitAccelError(
                    f"{metric.name} compares neighbouring frames, and this model makes images; leave it out."
                )
            continue
        if metric.network is None and source is not None:
            raise DitAccelError(f"{metric.name} looks through no network; write it without [{source}].")
        network: Any = None if metric.network is None else metric.network(networks, source)
        plain = metric.network is None or network.name == metric.published
        printed = metric.name if plain else f"{metric.name}[{network.name}]"
        if any(other.name == printed for other in chosen):
            raise DitAccelError(f"{printed} was asked for twice; leave one out.")
        chosen.append(ChosenMetric(printed, metric, network, asked=bool(named)))
    return chosen
