"""FLUX.3: the first blocks attend within text, image and conditioning images each; then come joint single blocks.

Joint sequences are [text | image | conditioning]. Of the first blocks only the image's are accelerated.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import packed_images
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed image [B, N, C] with ids [N, 4], text [B, T, C], and conditioning tokens [B, R, C] or None."""
    found = packed_images(call)
    if found.grid.conditioning:
        raise DitAccelError(
            f"{call.owner} needs img_ids of one image, or of several of one size; got {found.grid}. Put conditioning "
            "images into image_cond_hidden_states."
        )
    if call.get("image_cond_hidden_states") is None:
        return found
    conditioning = call.tensor("image_cond_hidden_states", 3).shape[1]
    notes = (f"{conditioning} tokens of conditioning images are dense both ways",)
    return CallLayout(dataclasses.replace(found.grid, conditioning=conditioning), notes=notes)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""
    return image_sizes(2 * vae_pixels(vae), text=512, text_first=True)


FAMILY = Family(
    name="flux3",
    transformers=("Flux3Transformer2DModel",),
    attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
    visual_attention=("mode_blocks.*.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="FLUX.3",
    timestep_scale=1000.0,
)
