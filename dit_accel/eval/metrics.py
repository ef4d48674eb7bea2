"""The metrics by name: what each is, which network it looks through, and how it is asked for.

A metric is asked for as ``psnr`` or, where a network decides its value, as ``fid[demo-clip]``. The name it is printed
under always says the network, save for the published ones: ``fid`` and ``kid`` are on Inception's features.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dit_accel.errors import DitAccelError
from dit_accel.registry import did_you_mean

if TYPE_CHECKING:
    import torch
    import torchmetrics

NAMES = ("psnr", "ssim", "temporal_psnr", "lpips", "perceptual", "fid", "kid", "clip_score", "frame_agreement")
DEMO_CLIP = "demo-clip"
INCEPTION = "inception"
HUB_CLIP = "openai/clip-vit-base-patch16"
REFERENCE_PACKAGES = ("torch_fidelity", "torchvision")

# What is measured when nothing is asked for: with the published networks, and on a machine without them.
PUBLISHED = ("psnr", "ssim", "temporal_psnr", "lpips", "fid", "kid", "clip_score", "frame_agreement")
EMBEDDED = (
    *("psnr", "ssim", "temporal_psnr"),
    *(f"{name}[{DEMO_CLIP}]" for name in ("perceptual", "fid", "kid", "clip_score", "frame_agreement")),
)


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
        name: as in `NAMES`.
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


def parse(text: str) -> tuple[str, str | None]:
    """Read ``name`` or ``name[network]``.

    Raises:
        DitAccelError: there is no such metric; the message suggests the nearest.
    """
    name, bracket, rest = text.partition("[")
    if name not in NAMES:
        raise DitAccelError(f"Unknown metric {text!r}.{did_you_mean(name, NAMES)} Metrics: {', '.join(NAMES)}.")
    if not bracket:
        return name, None
    if not rest.endswith("]") or len(rest) < 2:
        raise DitAccelError(f"A metric is written name or name[network], such as fid[{DEMO_CLIP}]; got {text!r}.")
    return name, rest[:-1]


def choose(asked: Iterable[str], embedded: bool, frames: int, device: torch.device) -> list[Metric]:
    """The metrics that were asked for, or those that suit the model and the machine, with their networks loaded.

    Args:
        asked: as typed; empty for the defaults. These are the published ones where the packages of the extra
            `eval-reference` are installed, and those of the embedded CLIP where not, or where the model is embedded.
        embedded: whether the model is.
        frames: of each sample; 1 leaves out what compares neighbouring frames.
        device: where the networks run.

    Raises:
        DitAccelError: a metric is unknown or asked for twice, its packages are missing, or its network cannot load.
    """
    asked = list(asked)
    defaults = EMBEDDED if embedded or not _installed(REFERENCE_PACKAGES) else PUBLISHED
    networks: dict[str, Any] = {}
    chosen: list[Metric] = []
    for text in asked or defaults:
        name, source = parse(text)
        kind: Kind = importlib.import_module(f"dit_accel.eval.{name}").METRIC
        if kind.video and frames == 1:
            if asked:
                raise DitAccelError(f"{text} compares neighbouring frames, and this model makes images; leave it out.")
            continue
        if kind.network is None and source is not None:
            raise DitAccelError(f"{name} looks through no network; write it without [{source}].")
        network = None if kind.network is None else _network(kind, source, networks, device)
        printed = name if network is None or network.name == _published(kind) else f"{name}[{network.name}]"
        if any(metric.name == printed for metric in chosen):
            raise DitAccelError(f"{printed} was asked for twice; leave one out.")
        chosen.append(Metric(printed, kind, network, asked=bool(asked)))
    return chosen


def _published(kind: Kind) -> str | None:
    """The name of the network that a metric's plain name stands for."""
    return {"features": INCEPTION, "lpips": "lpips"}.get(kind.network or "")


def _network(kind: Kind, source: str | None, networks: dict[str, Any], device: torch.device) -> Any:
    """The network of that source, loaded once."""
    if kind.network == "lpips":
        if source is not None:
            raise DitAccelError(
                f"lpips is the published one and takes no network; perceptual[{source}] is its formula on another."
            )
        source = "lpips"
    elif source is None:
        source = INCEPTION if kind.network == "features" else HUB_CLIP
    if kind.network == "clip" and (source == INCEPTION or source.endswith(".pth")):
        raise DitAccelError(f"{kind.name} needs a network that reads texts: {DEMO_CLIP}, a folder or a Hub id.")
    if source not in networks:
        networks[source] = _load(source, device)
    return networks[source]


def _load(source: str, device: torch.device) -> Any:
    if source == "lpips":
        from dit_accel.eval.lpips import Lpips

        return Lpips.load(device)
    if source == INCEPTION or source.endswith(".pth"):
        from dit_accel.eval.inception import Inception

        return Inception.load(device, None if source == INCEPTION else Path(source))
    from dit_accel.eval.clip import Clip
    from dit_accel.generation.sources import quietly

    with quietly():
        return Clip.load("demo" if source == DEMO_CLIP else source, device=device)


def require_packages(metric: str, packages: Iterable[str]) -> None:
    """See that packages are installed and can be loaded.

    Raises:
        DitAccelError: one is missing, with the command that installs it, or it is there and its import fails.
    """
    from dit_accel.generation.sources import first_line

    for package in packages:
        if not _installed((package,)):
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


def _installed(packages: Iterable[str]) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)
