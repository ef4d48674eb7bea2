"""What a metric is, and what its file builds on: the sample it scores, the network it looks through, its packages."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    import torch
    import torchmetrics

DEMO_CLIP = "demo-clip"
INCEPTION = "inception"


class FeatureExtractor(Protocol):
    """A network that turns images into vectors, whose distributions are compared."""

    name: str

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """Float32 [N, D] of images [N, 3, H, W] in [0, 1]."""
        ...


class Item:
    """What one sample is scored on; each network looks at it once.

    Args:
        frames: float32 [F, 3, H, W] in [0, 1].
        reference: the reference's frames of the same prompt and seed, of the same shape.
        prompt: what was asked for.
    """

    def __init__(self, frames: torch.Tensor, reference: torch.Tensor, prompt: str) -> None:
        self.frames, self.reference, self.prompt = frames, reference, prompt
        self._seen: dict[tuple[int, str], torch.Tensor] = {}

    def features(self, network: FeatureExtractor) -> torch.Tensor:
        """The frames' features, [F, D]."""
        return self._once(network, "features")

    def images(self, clip: Any) -> torch.Tensor:
        """The frames in the space that CLIP shares with texts, [F, D]."""
        return self._once(clip, "images")

    def _once(self, network: Any, tower: str) -> torch.Tensor:
        key = id(network), tower
        if key not in self._seen:
            self._seen[key] = getattr(network, tower)(self.frames)
        return self._seen[key]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A metric before its network is chosen; one file of this folder each, under the name `METRIC`.

    Args:
        name: as in `metrics.NAMES`.
        title, unit: for people.
        better: which values are good.
        about: how it is made, in one line.
        network: what it looks through: "features" (Inception or CLIP), "clip" (CLIP only), "lpips", or None.
        score: the value of one sample, from the item and the network; None for a metric of whole sets.
        collect: for a metric of whole sets, a torchmetrics metric for that many features. Its `update(features, real)`
            takes [N, D]; its `compute` raises `TooFew` where there are too few images for a number.
        least: images a set needs for that many features.
        video: it compares neighbouring frames, so a single image has none.
        decibels: averaged as mean squared errors, not as decibels.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    about: str
    network: Literal["features", "clip", "lpips"] | None = None
    score: Callable[[Item, Any], float] | None = None
    collect: Callable[[int], torchmetrics.Metric] | None = None
    least: Callable[[int], int] = lambda features: 1
    video: bool = False
    decibels: bool = False


class TooFew(Exception):
    """A set has too few images for a number; the message says how many are needed."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric with its network, ready to score.

    Args:
        name: the one to print.
        kind: what it is.
        network: loaded, or None.
        asked: whether it was asked for by name, so that leaving it out would be wrong.
    """

    name: str
    kind: Kind
    network: Any
    asked: bool

    def about(self) -> dict[str, str]:
        """For a report."""
        kind = self.kind
        title = kind.title if self.name == kind.name else f"{kind.title} [{self.network.name}]"
        return {"name": self.name, "title": title, "unit": kind.unit, "better": kind.better, "about": kind.about}


def require_packages(metric: str, packages: Iterable[str]) -> None:
    """See that packages are installed and can be loaded.

    Raises:
        DitAccelError: one is missing, with the command that installs it, or it is there and its import fails.
    """
    from dit_accel.generation.sources import first_line

    for package in packages:
        if not installed((package,)):
            raise DitAccelError(
                f"{metric} needs {package.replace('_', '-')}, which is not installed: "
                f"pip install 'dit_accel[eval-reference]'. Or measure with the embedded {DEMO_CLIP}."
            )
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:  # a build for another torch raises any of these
            raise DitAccelError(
                f"{metric} needs {package.replace('_', '-')}, which is installed but cannot be loaded "
                f"({first_line(error)}); install the build that belongs to this torch."
            ) from error


def installed(packages: Iterable[str]) -> bool:
    """Whether all of them are; none is imported."""
    return all(importlib.util.find_spec(package) is not None for package in packages)
