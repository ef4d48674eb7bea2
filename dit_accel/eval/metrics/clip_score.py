"""CLIP score: the agreement of frames and prompt."""

from __future__ import annotations

import torch
from torchmetrics.functional.regression import cosine_similarity

from dit_accel.eval.metric import Metric
from dit_accel.eval.networks import Networks


def clip_score(images: torch.Tensor, text: torch.Tensor) -> float:
    """max(100 cos(image, text), 0) of CLIP's vectors [F, D] and [D], averaged over frames before the maximum is taken.

    Source: Hessel et al. 2021, "CLIPScore" (arXiv:2104.08718), as torchmetrics computes it.
    """
    return max(100 * float(cosine_similarity(images, text.expand_as(images), reduction="mean")), 0.0)


METRIC = Metric(
    name="clip_score",
    title="CLIP score",
    better="higher",
    about="100 times the cosine between CLIP's vectors of each frame and of the prompt, averaged; from 0 to 100.",
    order=8,
    network=Networks.clip,
    score=lambda sample, clip: clip_score(sample.images(clip), clip.texts([sample.prompt])[0]),
)
