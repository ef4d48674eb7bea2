"""FLUX.1 (dev, schnell, Fill, Control, Kontext) and the models built on its blocks: Chroma, LongCat-Image, Ovis-Image.

Text precedes the image in dual and single blocks. Its padding is attended, as in training. Single blocks get the joined
sequence without the text's length, and the image is packed. Only the transformer's call has both: text in
`encoder_hidden_states`, rows and columns in `img_ids`.

A boolean mask masks Chroma's text. Its pipelines pass ones and zeros in the model's dtype, which the model adds to the
logits.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from dit_accel.pipelines.anchors import in_packed
from dit_accel.pipelines.family import CallLayout, Family, ModelCall, Preset
from dit_accel.pipelines.reading import bias_text, mask_text, packed_images
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed image [B, N, C], text [B, T, C] and image ids [N, 3], or [B, N, 3] as in older code.

    A conditioning image of the same size (Kontext) is a further frame; others are dense both ways.
    """
    found = packed_images(call)
    mask = call.get("attention_mask")
    if mask is None:
        return found
    read = mask_text if mask.dtype == torch.bool else bias_text
    return dataclasses.replace(read(call, found.grid, mask), notes=found.notes, masks=("attention_mask",))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""
    text = 256 if transformer.get("_class_name") == "OvisImageTransformer2DModel" else 512
    return image_sizes(2 * vae_pixels(vae), text=text, text_first=True)


RECOMMENDED = {
    "gna": Preset(
        config={"window": ("full", 80 / 256, 80 / 256), "stride": (1, 16, 16)},
        schedule={"dense_steps": 9 / 28},
        source="GNA (arXiv:2504.16922): FLUX.1-dev at 4096x4096, window 80x80 of 256x256 tokens, 9 of 28 steps dense",
    ),
}

FAMILY = Family(
    name="flux",
    transformers=(
        "FluxTransformer2DModel",
        "ChromaTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=sizes,
    summary="FLUX.1: dev, schnell, Fill, Control, Kontext; Chroma, LongCat-Image, Ovis-Image",
    timestep_scale=1000.0,
    recommended=RECOMMENDED,
    extend=in_packed,
)
