"""GLM-Image: glyph text stands before the image, and all of it is attended.

Editing keeps the keys of conditioning images in a cache, which then are keys without queries.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    if call.get("attention_mask") is not None:
        raise DitAccelError(
            f"{call.owner} adds its attention_mask to the logits, so that its zeros mask nothing; sparse attention "
            "takes masks that mask. Call it without one, as its pipeline does, or leave the model dense."
        )
    caches = call.get("kv_caches")
    if caches is not None and caches[0].mode == "read":
        raise DitAccelError(
            f"{call.owner} takes the keys of conditioning images from a cache, and sparse attention needs queries and "
            "keys of one sequence: make images from text alone, or leave the model dense."
        )
    config: Any = transformer.config
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    return CallLayout(dataclasses.replace(image_of(call, config.patch_size), text=text, text_first=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """The text is what the prompt asks to be written in the image."""
    return image_sizes(vae_pixels(vae) * transformer["patch_size"], text=2048, text_first=True)


FAMILY = Family(
    name="glm_image",
    transformers=("GlmImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="GLM-Image, from text",
)
