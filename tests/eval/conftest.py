"""What the tests of the evaluation share: a network small enough to know its answers."""

import numpy as np
import pytest
import torch


class Pooled:
    """A stand-in for CLIP: its vectors are the colours of an image's quarters; every text is one fixed vector."""

    name = "pooled"

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(frames, 2).flatten(1)

    def images(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.features(frames), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.ones(len(texts), 12), dim=-1)


@pytest.fixture
def pooled():
    return Pooled()


@pytest.fixture
def clips():
    """Makes `count` random clips, uint8 [F, H, W, 3]."""

    def make(count: int, frames: int = 5, side: int = 16, seed: int = 0):
        source = np.random.default_rng(seed)
        return [source.integers(0, 256, (frames, side, side, 3), dtype=np.uint8) for _ in range(count)]

    return make
