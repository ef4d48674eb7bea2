"""CLIP agreement between neighbouring frames: the constancy of a video's content."""

from __future__ import annotations

import torch
from torchmetrics.functional.regression import cosine_similarity

from dit_accel.eval.metric import Metric
from dit_accel.eval.networks import Networks


def frame_agreement(images: torch.Tensor) -> float:
    """Cosine between CLIP's vectors [F, D] of each frame and the next, averaged: at most 1, for a still picture."""
    if len(images) < 2:
        raise ValueError(f"Agreement between neighbouring frames needs 2 of them, got {len(images)}.")
    return float(cosine_similarity(images[:-1], images[1:], reduction="mean"))


METRIC = Metric(
    name="frame_agreement",
    title="Frame agreement",
    better="higher",
    about="Cosine between CLIP's vectors of neighbouring frames, averaged; a still picture has 1.",
    order=9,
    network=Networks.clip,
    score=lambda sample, clip: frame_agreement(sample.images(clip)),
    video=True,
)
