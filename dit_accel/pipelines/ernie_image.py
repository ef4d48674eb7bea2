"""ERNIE-Image: text follows the image; its padding is masked."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, text [B, T, C] and its lengths [B]."""
    grid = image_of(call, transformer.config.patch_size, call.length("text_bth"))
    return CallLayout(grid, text_lens=call.tensor("text_lens", 1).to(torch.int32))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """The pipeline packs 2 x 2 latents into one; the text is as long as the prompt."""
    return image_sizes(2 * vae_pixels(vae) * transformer["patch_size"], text=512)


FAMILY = Family(
    name="ernie_image",
    transformers=("ErnieImageTransformer2DModel",),
    attention=("layers.*.self_attention",),
    layout=layout,
    sizes=sizes,
    summary="ERNIE-Image",
)
