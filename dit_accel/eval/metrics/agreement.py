"""Agreement of frames with the prompt and with each other."""

from __future__ import annotations

import torch
from torchmetrics.functional.regression import cosine_similarity

from dit_accel.eval.metric import Metric
from dit_accel.eval.networks import Networks
from dit_accel.pipelines.demo import checker


def clip_score(images: torch.Tensor, text: torch.Tensor) -> float:
    """max(100 cos(image, text), 0) of CLIP's vectors [F, D] and [D], averaged over frames before the maximum is taken.

    Source: Hessel et al. 2021, "CLIPScore" (arXiv:2104.08718), as torchmetrics computes it.
    """
    return max(100 * float(cosine_similarity(images, text.expand_as(images), reduction="mean")), 0.0)


def frame_agreement(images: torch.Tensor) -> float:
    """Cosine between CLIP's vectors [F, D] of each frame and the next, averaged: at most 1, for a still picture."""
    if len(images) < 2:
        raise ValueError(f"Agreement between neighbouring frames needs 2 of them, got {len(images)}.")
    return float(cosine_similarity(images[:-1], images[1:], reduction="mean"))


def prompt_agreement(frames: torch.Tensor, prompt: str) -> float:
    """100 if frames [F, 3, H, W] in [0, 1] show one whole object and every attribute of the prompt, else 0."""
    return 100.0 * checker.read(frames.movedim(1, -1).cpu().numpy()).follows(prompt)


METRICS = (
    Metric(
        name="clip_score",
        title="CLIP score",
        better="higher",
        about="100 times the cosine between CLIP's vectors of each frame and of the prompt, averaged; from 0 to 100.",
        order=8,
        network=Networks.clip,
        score=lambda sample, clip: clip_score(sample.features(clip, "images"), clip.texts([sample.prompt])[0]),
    ),
    Metric(
        name="frame_agreement",
        title="Frame agreement",
        better="higher",
        about="Cosine between CLIP's vectors of neighbouring frames, averaged; a still picture has 1.",
        order=9,
        network=Networks.clip,
        score=lambda sample, clip: frame_agreement(sample.features(clip, "images")),
        video=True,
    ),
    Metric(
        name="prompt_agreement",
        title="As prompted",
        unit="%",
        better="higher",
        about="Share of videos with one whole object whose colour, shape, direction and background are the prompt's.",
        order=7,
        score=lambda sample, network: prompt_agreement(sample.frames, sample.prompt),
        default="demo",
        video=True,
    ),
)
