"""Fréchet distance between the features of two sets of images."""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dit_accel.eval.metric import Metric, TooFew
from dit_accel.eval.networks import INCEPTION, Networks


class Given(nn.Module):
    """Takes the place of torchmetrics' network for given features [N, num_features]: a network sees a frame once."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class Fid(FrechetInceptionDistance):
    """Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, arXiv:1706.08500).

    `update(features, real=...)` takes float [N, D] with D = `features`. States are summed over processes.
    """

    def __init__(self, features: int) -> None:
        super().__init__(feature=Given(features), normalize=True)
        self.orig_dtype = torch.float32  # torchmetrics sets it in update, which a process without samples never calls

    def compute(self) -> torch.Tensor:
        """The squared distance, 0 for equal sets.

        Raises:
            TooFew: a set has no more images than features, so its covariance is singular.
        """
        wanted = least(self.inception.num_features)
        got = min(int(self.real_features_num_samples), int(self.fake_features_num_samples))
        if got < wanted:
            raise TooFew(f"needs {wanted:,} images in each set, got {got:,}")
        return super().compute().clamp(min=0)  # a squared distance; equal sets round to a little below


def least(features: int) -> int:
    """Images for a regular covariance of that many features."""
    return features + 1


METRIC = Metric(
    name="fid",
    title="FID",
    better="lower",
    about="Fréchet distance between the features of all frames and those of the real set; 0 for equal sets.",
    order=6,
    network=Networks.features,
    published=INCEPTION,
    packages=("torch_fidelity",),
    collect=Fid,
    least=least,
    enough=lambda features: 5 * features,  # its authors ask for 10,000 images with 2,048 features
)
