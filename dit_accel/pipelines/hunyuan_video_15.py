"""HunyuanVideo 1.5: text to video and image to video.

Image, byT5 and text tokens follow the video; the model reorders them so that each sample's valid ones come first. Its
processor masks the rest with an N x N tensor, 13 GB for 121 frames at 720p. In sparse calls `attend_video_and_text`
replaces it and needs only the number of valid tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall
from dit_accel.pipelines.processor import attend_joint
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, patch_of, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches, before image, byT5 and text tokens, each [B, T, C].

    In text to video the image tokens are all zero, and the model treats them as padding.
    """
    image = call.tensor("image_embeds", 3)
    masks = [call.tensor(name, 2) for name in ("encoder_attention_mask", "encoder_attention_mask_2")]
    text = image.shape[1] + sum(mask.shape[1] for mask in masks)
    valid = sum((mask.bool().sum(1) for mask in masks), (image != 0).any() * image.shape[1])
    return CallLayout(video_of(call, patch_of(transformer.config), text), text_lens=valid.to(torch.int32))


def attend_video_and_text(
    processor: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`HunyuanVideo15AttnProcessor2_0` without its mask: video [B, N, C] and text [B, T, C] in and out.

    The output of padded text is arbitrary and never read; with the mask it is zero.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    rotary = image_rotary_emb
    rotate = None if rotary is None else lambda x: apply_rotary_emb(x, rotary, sequence_dim=1)
    return attend_joint(attn, hidden_states, encoder_hidden_states, rotate)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 1,000 tokens, 256 of glyphs and 729 of an image; the default size follows `target_size`."""
    height, width = (720, 1280) if transformer["target_size"] >= 960 else (480, 848)
    return video_sizes(vae, patch_of(transformer), 121, height, width, text=1985)


FAMILY = Family(
    name="hunyuan_video_15",
    transformers=("HunyuanVideo15Transformer3DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="HunyuanVideo 1.5: text to video, image to video",
    sparse_calls={"HunyuanVideo15AttnProcessor2_0": attend_video_and_text},
    recommended=TRAINING_FREE,
)
