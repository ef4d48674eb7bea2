"""Allegro.

Self-attention (`attn1`) sees the video tokens alone. Its pipeline passes no mask for them; a call with one is refused,
since the mask cuts out pixels of a padded frame.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import Call, Family, Layout
from dit_accel.pipelines.reading import video_of


def layout(transformer: nn.Module, call: Call) -> Layout:
    """The latent [B, C, F, H, W], cut into patches."""
    if call.get("attention_mask") is not None:
        raise DitAccelError(
            "Allegro is called with an attention_mask over its video tokens, which accelerated attention cannot "
            "honour; call it without, as its pipeline does, or run it dense."
        )
    config: Any = transformer.config
    return Layout(video_of(call, (config.patch_size_t, config.patch_size, config.patch_size)))


FAMILY = Family(
    name="allegro",
    transformers=("AllegroTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    summary="Allegro: text to video",
)
