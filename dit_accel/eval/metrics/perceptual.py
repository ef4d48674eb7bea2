"""Perceptual distance to a baseline, by the features of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.eval.metric import Metric, paired
from dit_accel.eval.networks import Networks


def perceptual(frames: Tensor, baseline: Tensor, network: Any) -> Tensor:
    """LPIPS's distance (Zhang et al. 2018, equation 1) with all weights one, on the layers of any network.

    Per layer: activations scaled to unit length over channels, squared differences summed over channels and averaged
    over places; then the sum over layers. LPIPS has other layers and weights, so name the result after the network.

    Args:
        frames, baseline: float [N, 3, H, W] in [0, 1], of one shape.
        network: its `layers(frames)` are [N, C, h, w] each, as those of `dit_accel.eval.networks.Clip`.

    Returns:
        Float32 [N], 0 for equal frames, at most 4 for each layer.
    """
    frames, baseline = paired("Perceptual distance", frames, baseline)
    distances = []
    for layers in zip(network.layers(frames), network.layers(baseline), strict=True):
        ours, theirs = (functional.normalize(layer.float(), dim=1) for layer in layers)
        distances.append((ours - theirs).square().sum(1).mean((1, 2)))
    return torch.stack(distances).sum(0)


METRIC = Metric(
    name="perceptual",
    title="Perceptual distance",
    better="lower",
    about="LPIPS's formula, unweighted, on CLIP's image layers: distance to the baseline, averaged over frames.",
    order=5,
    network=Networks.clip,
    default="embedded",
    score=lambda sample, clip: float(perceptual(sample.frames, sample.baseline, clip).mean()),
)
