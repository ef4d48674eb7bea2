"""CogView3-Plus and CogView4: text precedes the image; its padding is attended, as in training.

CogView4 adds an `attention_mask` to the logits; its pipelines pass none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import bias_text, image_of
from dit_accel.pipelines.sizes import Config, Sizes, square_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    text = call.length("encoder_hidden_states")
    grid, mask = image_of(call, transformer.config.patch_size, text, text_first=True), call.get("attention_mask")
    if mask is None:
        return CallLayout(grid)
    return dataclasses.replace(bias_text(call, grid, mask), masks=("attention_mask",))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """CogView3-Plus has 224 text tokens; CogView4 as many as the prompt, padded to a multiple of 16."""
    text = 224 if transformer.get("_class_name") == "CogView3PlusTransformer2DModel" else 1024
    return square_sizes(transformer, vae, text=text, text_first=True, longest=transformer["pos_embed_max_size"])


FAMILY = Family(
    name="cogview",
    transformers=("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="CogView3-Plus, CogView4",
)
