"""Perceptual distance: how far frames are from a reference for a network that looks at them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.eval.metrics.metric import Kind


class Layered(Protocol):
    """What gives activations for frames, as `dit_accel.eval.metrics.clip.Clip` does."""

    def layers(self, frames: Tensor) -> list[Tensor]: ...


def perceptual(frames: Tensor, reference: Tensor, network: Layered) -> Tensor:
    """LPIPS's distance (Zhang et al. 2018, equation 1) with all weights one, on the layers of any network.

    Per layer: activations scaled to unit length over channels, squared differences summed over channels and averaged
    over places; then the sum over layers. It is not LPIPS, whose layers and weights are others: name it after the
    network.

    Args:
        frames, reference: float [N, 3, H, W] in [0, 1], of the same shape.
        network: its `layers` give [N, C, h, w] each.

    Returns:
        Float32 [N], 0 for equal frames, at most 4 for each layer.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"Perceptual distance: equal shapes, got {tuple(frames.shape)} and {tuple(reference.shape)}.")
    pairs = zip(network.layers(frames), network.layers(reference), strict=True)
    return torch.stack([_distance(ours, theirs) for ours, theirs in pairs]).sum(0)


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    difference = functional.normalize(ours.float(), dim=1) - functional.normalize(theirs.float(), dim=1)
    return difference.square().sum(1).mean((1, 2))


METRIC = Kind(
    name="perceptual",
    title="Perceptual distance",
    unit="",
    better="lower",
    about="LPIPS's formula, unweighted, on CLIP's image layers: distance to the reference, averaged over frames.",
    network="clip",
    score=lambda item, clip: float(perceptual(item.frames, item.reference, clip).mean()),
)
