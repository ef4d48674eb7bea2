"""CogVideoX 1.0 and 1.5, and ConsisID, which is built like 1.0.

Text stands before the video in every block and its padding is attended, as the model was trained. The latent has its
frames before its channels. CogVideoX 1.5 cuts it into patches along time too. ConsisID's face features enter through
attention of their own between the blocks, which is left alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.pipelines.family import Call, Family, Layout, patch_grid


def layout(transformer: nn.Module, call: Call) -> Layout:
    """The latent [B, F, C, H, W], cut into patches, and before it text [B, T, C]."""
    config: Any = transformer.config
    latent = call.tensor("hidden_states", 5)
    sizes = latent.shape[1], latent.shape[3], latent.shape[4]
    grid = patch_grid(sizes, (config.get("patch_size_t") or 1, config.patch_size, config.patch_size))
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    return Layout(dataclasses.replace(grid, text=text, text_first=True))


FAMILY = Family(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    summary="CogVideoX 1.0 and 1.5: text, image and video to video, control; ConsisID",
)
