"""CogVideoX 1.0 and 1.5, and ConsisID, which is built like 1.0.

Text stands before the video in every block and its padding is attended, as the model was trained. The latent has its
frames before its channels. CogVideoX 1.5 cuts it into patches along time too. ConsisID's face features enter through
attention of their own between the blocks, which is left alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.sizes import Config, Sizes, vae_pixels, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, F, C, H, W], cut into patches, and before it text [B, T, C]."""
    config: Any = transformer.config
    latent = call.tensor("hidden_states", 5)
    sizes = latent.shape[1], latent.shape[3], latent.shape[4]
    grid = patch_grid(sizes, (config.get("patch_size_t") or 1, config.patch_size, config.patch_size))
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    return CallLayout(dataclasses.replace(grid, text=text, text_first=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """In version 1.5 a token is two latent frames, of which the pipeline makes one more than asked for."""
    patch = transformer.get("patch_size_t") or 1, transformer["patch_size"], transformer["patch_size"]
    pixels, text = vae_pixels(vae), transformer["max_text_seq_length"]
    height, width = transformer["sample_height"] * pixels, transformer["sample_width"] * pixels
    return video_sizes(vae, patch, transformer["sample_frames"], height, width, text=text, text_first=True)


FAMILY = Family(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="CogVideoX 1.0 and 1.5: text, image and video to video, control; ConsisID",
)
