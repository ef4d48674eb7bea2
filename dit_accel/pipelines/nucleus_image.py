"""Nucleus-Image, a mixture of experts: text stands behind the image, masked, and among the keys alone.

TextKVCache, which keeps the text's keys and values from step to step, goes with it.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.qwen_image import images
from dit_accel.pipelines.reading import conditioning_notes, mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels
from dit_accel.tokens import TokenGrid


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """A packed image [B, N, C] with `img_shapes`, text [B, T, C] and its mask [B, T] or None."""
    tokens = call.tensor("hidden_states", 3).shape[1]
    (frames, height, width), conditioning = images(call, tokens)
    grid = TokenGrid(
        frames, height, width, text=call.tensor("encoder_hidden_states", 3).shape[1], conditioning=conditioning
    )
    mask = call.get("encoder_hidden_states_mask")
    found = CallLayout(grid) if mask is None else mask_text(call, grid, mask)
    return dataclasses.replace(found, notes=conditioning_notes(conditioning))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""
    return image_sizes(2 * vae_pixels(vae), text=1024)


FAMILY = Family(
    name="nucleus_image",
    transformers=("NucleusMoEImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="Nucleus-Image",
    timestep_scale=1000.0,
    text_is_keys=True,
)
