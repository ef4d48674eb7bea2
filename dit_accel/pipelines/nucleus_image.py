"""Nucleus-Image, a mixture of experts: text follows the image, masked, as keys without queries.

Diffusers' TextKVCache, which keeps the text's keys and values between steps, works with it.
"""

from __future__ import annotations

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.qwen_image import images_and_text
from dit_accel.pipelines.sizes import packed_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """A packed image [B, N, C] with `img_shapes`, text [B, T, C] and its mask [B, T] or None."""
    return images_and_text(call, call.length("hidden_states"))


FAMILY = Family(
    name="nucleus_image",
    transformers=("NucleusMoEImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=packed_sizes(text=1024, text_first=False),
    summary="Nucleus-Image",
    timestep_scale=1000.0,
    text_is_keys=True,
)
