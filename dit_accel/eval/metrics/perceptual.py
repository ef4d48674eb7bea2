"""Perceptual distances to a baseline, by the features of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from dit_accel.errors import DitAccelError, first_line
from dit_accel.eval.metric import Metric, paired
from dit_accel.eval.networks import Networks, require_package

BACKBONE = "alex"  # the variant its authors recommend as a metric


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924), AlexNet variant, from torchmetrics.

    Raises:
        DitAccelError: another network is named, torchvision cannot be loaded, or it cannot fetch the backbone.
    """

    name = "lpips"

    def __init__(self, networks: Networks, source: str | None) -> None:
        if source is not None:
            raise DitAccelError(f"lpips takes no other network; perceptual[{source}] is its formula on that one.")
        require_package(self.name, "torchvision")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=BACKBONE, normalize=True)
        except OSError as error:
            raise DitAccelError(
                f"The backbone of lpips cannot be fetched ({first_line(error)}). Measure perceptual[demo-clip] instead."
            ) from error
        self.metric, self.device = metric.to(networks.device), networks.device

    @torch.no_grad()
    def __call__(self, frames: torch.Tensor, baseline: torch.Tensor) -> float:
        """The distance, averaged over frames [F, 3, H, W] in [0, 1]; 0 for equal ones."""
        value = float(self.metric(frames.to(self.device), baseline.to(self.device)))
        self.metric.reset()
        return value


def perceptual(frames: torch.Tensor, baseline: torch.Tensor, network: Any) -> torch.Tensor:
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


METRICS = (
    Metric(
        name="lpips",
        title="LPIPS",
        better="lower",
        about="Learned perceptual distance (AlexNet) to the baseline of the same prompt and seed, "
        "averaged over frames.",
        order=4,
        network=Lpips,
        published=Lpips.name,
        packages=("torchvision",),
        default="published",
        score=lambda sample, lpips: lpips(sample.frames, sample.baseline),
    ),
    Metric(
        name="perceptual",
        title="Perceptual distance",
        better="lower",
        about="LPIPS's formula, unweighted, on CLIP's image layers: distance to the baseline, averaged over frames.",
        order=5,
        network=Networks.clip,
        default="embedded",
        score=lambda sample, clip: float(perceptual(sample.frames, sample.baseline, clip).mean()),
    ),
)
