"""EasyAnimate: text, image and video to video, and control.

Text stands before the video in every block and its padding is attended, as the model was trained. Text of a second
encoder follows the first's. Inpainting and control latents are further channels of the same grid.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches within frames, and before it text [B, T, C]."""
    config: Any = transformer.config
    grid = video_of(call, (1, config.patch_size, config.patch_size))
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    if call.get("encoder_hidden_states_t5") is not None:
        text += call.tensor("encoder_hidden_states_t5", 3).shape[1]
    return CallLayout(dataclasses.replace(grid, text=text, text_first=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Its VAE has a stride along time in all stages but two."""
    strides = dict(vae) | {"temporal_compression_ratio": 2 ** (len(vae["block_out_channels"]) - 2)}
    patch = 1, transformer["patch_size"], transformer["patch_size"]
    return video_sizes(strides, patch, 49, 512, 512, text=256, text_first=True)


FAMILY = Family(
    name="easyanimate",
    transformers=("EasyAnimateTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="EasyAnimate: text, image and video to video, control",
)
