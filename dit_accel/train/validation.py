"""Samples of a model in training, always with the same prompts and noise, to show what training changes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from dit_accel.files import staged
from dit_accel.generation import sampling
from dit_accel.generation.output import write_frames


@dataclasses.dataclass(frozen=True)
class Validation:
    """The samples to generate.

    Args:
        prompts: one sample each; the i-th has the noise of seed i.
        arguments: of the pipeline's call: size, steps, guidance.
        fps: frames a second of the videos.
    """

    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    fps: int = 8

    def generate(self, pipe: DiffusionPipeline) -> list[np.ndarray]:
        """float32 [F, H, W, 3] in [0, 1] for each prompt; an image has one frame."""
        pipe.set_progress_bar_config(disable=True)
        made = []
        for seed, prompt in enumerate(self.prompts):
            result = sampling.call(pipe, {"prompt": prompt, **self.arguments}, seed)
            made.append(result.frames[0] if hasattr(result, "frames") else result.images[:1])
        return made

    def write(self, folder: pathlib.Path, made: list[np.ndarray]) -> None:
        """Write the samples as mp4 or png."""
        for index, frames in enumerate(made):
            path = folder / f"{index:02d}{'.mp4' if len(frames) > 1 else '.png'}"
            with staged(path) as stage:
                write_frames(stage / path.name, (frames * 255).round().astype("uint8"), self.fps)
