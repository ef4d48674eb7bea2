"""Mochi 1.

Text follows the video. The model's processor cuts off each sample's padding and calls attention once per sample. In
sparse calls `attend_video_and_text` replaces it: one call for the batch, where padding is never a key. The last block
has no text output.

The timestep rises from 0 to 1000 while the noise falls, so a bare transformer needs `set_step`.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall
from dit_accel.pipelines.processor import attend_joint
from dit_accel.pipelines.reading import mask_text, video_of
from dit_accel.pipelines.sizes import Config, Sizes, patch_of, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches within frames, before text [B, T, C] with its mask [B, T]."""
    mask = call.tensor("encoder_attention_mask", 2)
    found = mask_text(call, video_of(call, patch_of(transformer.config), mask.shape[1]), mask)
    if found.rows is not None:
        raise DitAccelError(
            "Mochi's encoder_attention_mask has valid tokens behind padding. The model itself then adds the attention "
            "of one token to another; put the padding at the end of the text, as Mochi's pipeline does."
        )
    return found


def attend_video_and_text(
    processor: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`MochiAttnProcessor2_0` in one call for the batch: video [B, N, C] and text [B, T, C] in and out.

    The output of padded text is arbitrary and never read; the model's processor makes it zero.
    """
    rotary = image_rotary_emb
    rotate = None if rotary is None else lambda x: _rotate(x, *rotary)
    return attend_joint(attn, hidden_states, encoder_hidden_states, rotate)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of adjacent channels of x [B, N, H, D] by angles [N, H, D / 2], one set a head."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """The pipeline fixes the VAE's strides at 6 frames and 8 pixels."""
    strides = {"temporal_compression_ratio": 6, "spatial_compression_ratio": 8}
    return video_sizes(strides, patch_of(transformer), 19, 480, 848, text=256)


FAMILY = Family(
    name="mochi",
    transformers=("MochiTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="Mochi 1: text to video",
    timestep_scale=None,
    sparse_calls={"MochiAttnProcessor2_0": attend_video_and_text},
    recommended=TRAINING_FREE,
)
