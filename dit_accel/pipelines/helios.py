"""Helios: the section of the video that is generated; its history precedes it, dense both ways.

The sequence is [history at a quarter of the size | at half | at full size | section]; text enters by cross-attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall
from dit_accel.pipelines.framepack import SECTION, count_tokens
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Shape, Sizes, patch_of, vae_frames, video_sizes

# Parts of the history: latents of so many patches a side make a token; latent frames by default.
HISTORY = {"long": (4, 16), "mid": (2, 2), "short": (1, 2)}


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The section [B, C, F, H, W] in patches, and the history's parts that have latents and indices."""
    patch, history = patch_of(transformer.config), 0
    for name, (times, _) in HISTORY.items():
        latents = call.get(f"latents_history_{name}")
        if latents is not None and call.get(f"indices_latents_history_{name}") is not None:
            history += count_tokens(latents.shape[2:], patch, times)
    note = f"{history} tokens of the history are dense both ways"
    return CallLayout(video_of(call, patch, history, text_first=True), notes=(note,) if history else ())


def sizes(transformer: Config, vae: Config) -> Sizes:
    """A video is made of whole sections, each with the same number of tokens."""
    patch = patch_of(transformer)

    def history(shape: Shape) -> int:
        sides = [side * step for side, step in zip(shape[1:], patch[1:], strict=True)]
        return sum(count_tokens((kept, *sides), patch, times) for times, kept in HISTORY.values())

    section = (SECTION - 1) * vae_frames(vae) + 1
    rest = {"frames_first": section, "tokens_step": 0, "tokens_first": SECTION // patch[0]}
    made = video_sizes(vae, patch, 4 * section, 384, 640, text=history, text_first=True, **rest)
    return dataclasses.replace(made, frames_step=section)


FAMILY = Family(
    name="helios",
    transformers=("HeliosTransformer3DModel",),
    attention=("blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="Helios: text, image and video to video in sections",
    recommended=TRAINING_FREE,
)
