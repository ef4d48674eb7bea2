"""Inception's features, which FID and KID were published with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.eval.metrics.metric import INCEPTION, require_packages
from dit_accel.generation.sources import first_line

FEATURES = 2048
BATCH = 64  # images in the network at once


class Inception:
    """torch-fidelity's port of the Inception v3 that FID was defined with, as torchmetrics runs it.

    Attributes:
        name: "inception".
    """

    name = INCEPTION

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network, self.device = network, device

    @classmethod
    def load(cls, device: torch.device, weights: Path | None = None) -> Inception:
        """Load it.

        Args:
            device: where it runs.
            weights: a local file; if None, torch-fidelity fetches them once.

        Raises:
            DitAccelError: torch-fidelity is missing or cannot be loaded, or the weights cannot be read or fetched.
        """
        require_packages("fid and kid on Inception's features", ("torch_fidelity",))
        if weights is not None and not weights.is_file():
            raise DitAccelError(f"There is no file {weights} with Inception's weights.")
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = None if weights is None else str(weights)
        try:
            network = NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=path)
        except (OSError, RuntimeError) as error:  # RuntimeError: a state dict of another model
            raise DitAccelError(
                f"Inception's weights cannot be {'fetched' if weights is None else f'read from {weights}'} "
                f"({first_line(error)}). Give a local file as fid[FILE.pth], or measure fid[demo-clip]."
            ) from error
        return cls(network.to(device), device)

    @torch.no_grad()
    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """Float32 [N, 2048] of images [N, 3, H, W] in [0, 1]; the network takes them in 8 bits."""
        pixels = (frames * 255).round().to(torch.uint8)
        return torch.cat([self.network(part.to(self.device)).float() for part in pixels.split(BATCH)])
