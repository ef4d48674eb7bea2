"""The metrics by name: how one is asked for, and which network it looks through.

A metric is asked for as ``psnr`` or, where a network decides its value, as ``fid[demo-clip]``. The name it is printed
under always says the network, save for the published ones: ``fid`` and ``kid`` are on Inception's features.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.eval.metrics.metric import DEMO_CLIP, INCEPTION, Kind, Metric, installed
from dit_accel.registry import did_you_mean

if TYPE_CHECKING:
    import torch

NAMES = ("psnr", "ssim", "temporal_psnr", "lpips", "perceptual", "fid", "kid", "clip_score", "frame_agreement")
HUB_CLIP = "openai/clip-vit-base-patch16"
REFERENCE_PACKAGES = ("torch_fidelity", "torchvision")

# What is measured when nothing is asked for: with the published networks, and on a machine without them.
PUBLISHED = ("psnr", "ssim", "temporal_psnr", "lpips", "fid", "kid", "clip_score", "frame_agreement")
EMBEDDED = (
    *("psnr", "ssim", "temporal_psnr"),
    *(f"{name}[{DEMO_CLIP}]" for name in ("perceptual", "fid", "kid", "clip_score", "frame_agreement")),
)


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
    defaults = EMBEDDED if embedded or not installed(REFERENCE_PACKAGES) else PUBLISHED
    networks: dict[str, Any] = {}
    chosen: list[Metric] = []
    for text in asked or defaults:
        name, source = parse(text)
        kind: Kind = importlib.import_module(f"dit_accel.eval.metrics.{name}").METRIC
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
        from dit_accel.eval.metrics.lpips import Lpips

        return Lpips.load(device)
    if source == INCEPTION or source.endswith(".pth"):
        from dit_accel.eval.metrics.inception import Inception

        return Inception.load(device, None if source == INCEPTION else Path(source))
    from dit_accel.eval.metrics.clip import Clip
    from dit_accel.generation.sources import quietly

    with quietly():
        return Clip.load("demo" if source == DEMO_CLIP else source, device=device)
