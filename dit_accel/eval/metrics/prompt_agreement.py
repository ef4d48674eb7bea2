"""Prompt agreement: whether a video of the embedded model shows what its prompt says."""

from __future__ import annotations

import torch

from dit_accel.eval.metric import Metric
from dit_accel.pipelines.demo import checker


def prompt_agreement(frames: torch.Tensor, prompt: str) -> float:
    """100 if frames [F, 3, H, W] in [0, 1] show one whole object and every attribute of the prompt, else 0."""
    return 100.0 * checker.read(frames.movedim(1, -1).cpu().numpy()).follows(prompt)


METRIC = Metric(
    name="prompt_agreement",
    title="As prompted",
    unit="%",
    better="higher",
    about="Share of videos with one whole object whose colour, shape, direction and background are the prompt's.",
    order=7,
    score=lambda sample, network: prompt_agreement(sample.frames, sample.prompt),
    default="demo",
    video=True,
)
