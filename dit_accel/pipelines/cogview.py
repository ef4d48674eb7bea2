"""CogView3-Plus and CogView4: text stands before the image, and its padding is attended, as the models were trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import Call, Family, Layout
from dit_accel.pipelines.reading import image_of


def layout(transformer: nn.Module, call: Call) -> Layout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    if call.get("attention_mask") is not None:
        raise DitAccelError(
            f"{call.owner} adds its attention_mask to the logits, so that its zeros mask nothing; sparse attention "
            "takes masks that mask. Call it without one, as its pipeline does, or leave the model dense."
        )
    config: Any = transformer.config
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    return Layout(dataclasses.replace(image_of(call, config.patch_size), text=text, text_first=True))


FAMILY = Family(
    name="cogview",
    transformers=("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    summary="CogView3-Plus, CogView4",
)
