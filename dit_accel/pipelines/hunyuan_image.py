"""HunyuanImage 2.1 and its refiner.

Text follows the image; its padding is masked. With glyph text (ByT5) the model reorders the tokens: valid glyph text,
valid text, then the padding of both. The refiner's latents have a frame axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.reading import mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] or [B, C, F, H, W] in patches; text [B, T, C], glyph text, and the mask of each."""
    patch = transformer.config.patch_size
    sizes = call.tensor("hidden_states", len(patch) + 2).shape[2:]
    image = [1] * (3 - len(patch))
    visual = patch_grid((*image, *sizes), (*image, *patch))
    mask = call.tensor("encoder_attention_mask", 2)
    if call.get("encoder_hidden_states_2") is None or transformer.context_embedder_2 is None:
        return mask_text(call, dataclasses.replace(visual, text=mask.shape[1]), mask)
    valid = torch.cat((mask, call.tensor("encoder_attention_mask_2", 2)), 1) != 0
    return CallLayout(dataclasses.replace(visual, text=valid.shape[1]), text_lens=valid.sum(1, dtype=torch.int32))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 1,000 tokens, and 128 of glyphs."""
    pixels = vae_pixels(vae)
    return image_sizes(pixels * transformer["patch_size"][-1], 64 * pixels, text=1128)


FAMILY = Family(
    name="hunyuan_image",
    transformers=("HunyuanImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=sizes,
    summary="HunyuanImage 2.1",
)
