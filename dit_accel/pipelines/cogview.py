"""CogView3-Plus and CogView4: text stands before the image, and its padding is attended, as the models were trained.

A mask that CogView4 is given, which its pipelines do not, it adds to the logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import bias_text, image_of
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    config: Any = transformer.config
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    grid = dataclasses.replace(image_of(call, config.patch_size), text=text, text_first=True)
    mask = call.get("attention_mask")
    if mask is None:
        return CallLayout(grid)
    return dataclasses.replace(bias_text(call, grid, mask), masks=("attention_mask",))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """CogView3-Plus has 224 tokens of text; those of CogView4 are the prompt's, padded to 16."""
    pixels, longest = vae_pixels(vae), transformer["pos_embed_max_size"]
    text = 224 if transformer.get("_class_name") == "CogView3PlusTransformer2DModel" else 1024
    side = transformer["sample_size"] * pixels
    return image_sizes(pixels * transformer["patch_size"], side, text=text, text_first=True, longest=longest)


FAMILY = Family(
    name="cogview",
    transformers=("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="CogView3-Plus, CogView4",
)
