"""Perceptual distance: how far frames are from a baseline for a network that looks at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.eval.metric import Metric
from dit_accel.eval.networks import Networks


def perceptual(frames: Tensor, baseline: Tensor, network: Any) -> Tensor:
    """LPIPS's distance (Zhang et al. 2018, equation 1) with all weights one, on the layers of any network.

    Per layer: activations scaled to unit length over channels, squared differences summed over channels and averaged
    over places; then the sum over layers. It is not LPIPS, whose layers and weights are others: name it after the
    network.

    Args:
        frames, baseline: float [N, 3, H, W] in [0, 1], of the same shape.
        network: its `layers(frames)` are [N, C, h, w] each, as those of `dit_accel.eval.networks.Clip`.

    Returns:
        Float32 [N], 0 for equal frames, at most 4 for each layer.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != baseline.shape:
        raise ValueError(f"Perceptual distance: equal shapes, got {tuple(frames.shape)} and {tuple(baseline.shape)}.")
    pairs = zip(network.layers(frames), network.layers(baseline), strict=True)
    return torch.stack([_distance(ours, theirs) for ours, theirs in pairs]).sum(0)


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    difference = functional.normalize(ours.float(), dim=1) - functional.normalize(theirs.float(), dim=1)
    return difference.square().sum(1).mean((1, 2))


METRIC = Metric(
    name="perceptual",
    title="Perceptual distance",
    unit="",
    better="lower",
    about="LPIPS's formula, unweighted, on CLIP's image layers: distance to the baseline, averaged over frames.",
    order=5,
    network=Networks.clip,
    default="embedded",
    score=lambda sample, clip: float(perceptual(sample.frames, sample.baseline, clip).mean()),
)
