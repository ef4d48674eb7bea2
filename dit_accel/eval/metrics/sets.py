"""Distances between the features of two sets of images."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dit_accel.eval.metric import Metric, TooFew
from dit_accel.eval.networks import INCEPTION, Networks


class Precomputed(nn.Module):
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
        super().__init__(feature=Precomputed(features), normalize=True)
        self.orig_dtype = torch.float32  # torchmetrics sets it in update, which a process without samples never calls

    def compute(self) -> torch.Tensor:
        """The squared distance, 0 for equal sets; `TooFew` where no more images than features make a covariance."""
        wanted = self.inception.num_features + 1
        got = min(int(self.real_features_num_samples), int(self.fake_features_num_samples))
        if got < wanted:
            raise TooFew(f"needs {wanted:,} images in each set, got {got:,}")
        return super().compute().clamp(min=0)  # a squared distance; equal sets round to a little below


SUBSET = 1000  # images a subset, as published; smaller sets are taken whole
SUBSETS = 100
SEED = 0
LEAST = 2  # the unbiased estimate divides by n (n - 1)


class Kid(KernelInceptionDistance):
    """Squared maximum mean discrepancy under a cubic kernel (Bińkowski et al. 2018, arXiv:1801.01401).

    `update(features, real=...)` takes float [N, D] with D = `features`. Features are gathered in the processes' order,
    and subsets have a fixed seed. So the same images give the same value on any number of processes.
    """

    def __init__(self, features: int) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
            super().__init__(feature=Precomputed(features), subsets=SUBSETS, subset_size=SUBSET, normalize=True)
        for name in ("real_features", "fake_features"):
            self.add_state(name, [], dist_reduce_fx="cat")
            getattr(self, name).append(torch.zeros(0, features))  # a process without samples still takes part

    def compute(self) -> torch.Tensor:
        """The mean over subsets; about 0 for equal sets, at random slightly below. `TooFew` for a single image."""
        # gathered features are one tensor, others a list of them
        both = ([x] if isinstance(x, torch.Tensor) else x for x in (self.real_features, self.fake_features))
        sizes = [sum(map(len, parts)) for parts in both]
        if min(sizes) < LEAST:
            raise TooFew(f"needs {LEAST} images in each set, got {min(sizes)}")
        self.subset_size = min(SUBSET, *sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return super().compute()[0]


METRICS = (
    Metric(
        name="fid",
        title="FID",
        better="lower",
        about="Fréchet distance between the features of all frames and those of the real set; 0 for equal sets.",
        order=6,
        network=Networks.features,
        published=INCEPTION,
        packages=("torch_fidelity",),
        collect=Fid,
        least=lambda features: features + 1,
        enough=lambda features: 5 * features,  # its authors ask for 10,000 images with 2,048 features
    ),
    Metric(
        name="kid",
        title="KID",
        better="lower",
        about="Kernel distance (cubic, unbiased, 100 subsets of up to 1,000) between all frames and the real set.",
        order=7,
        network=Networks.features,
        published=INCEPTION,
        packages=("torch_fidelity",),
        collect=Kid,
        least=lambda features: LEAST,
        enough=lambda features: SUBSET,
    ),
)
