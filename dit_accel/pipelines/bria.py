"""Bria 3.2 and Bria FIBO: blocks, text and image ids as in FLUX.1, but the timestep in the scheduler's own units.

FIBO's pipelines mask padded text through `joint_attention_kwargs`.
"""

from __future__ import annotations

import torch
from torch import nn

from dit_accel.pipelines import flux
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """As FLUX.1, with FIBO's mask bool [B, 1, 1, tokens] in `joint_attention_kwargs`."""
    found = flux.layout(transformer, call)
    mask = (call.get("joint_attention_kwargs") or {}).get("attention_mask")
    if mask is None or mask.dtype != torch.bool:
        return found
    return mask_text(call, found.grid, mask, found.notes)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """A token is 2 x 2 latents, in FIBO one latent; FIBO's text is as long as the prompt, at most 3,000 tokens."""
    if transformer.get("_class_name") == "BriaFiboTransformer2DModel":
        return image_sizes(vae_pixels(vae), text=3000, text_first=True)
    return image_sizes(2 * vae_pixels(vae), text=128, text_first=True)


FAMILY = Family(
    name="bria",
    transformers=("BriaTransformer2DModel", "BriaFiboTransformer2DModel"),
    attention=flux.FAMILY.attention,
    layout=layout,
    sizes=sizes,
    summary="Bria 3.2, Bria FIBO",
)
