"""HunyuanVideo 1.5: text to video and image to video.

Behind the video stand image, byT5 and text tokens, sorted by the model so that each sample's valid ones come first. The
model's processor masks the rest with a tensor of tokens x tokens, 13 GB for 121 frames at 720p; in sparse calls
`attend_video_and_text` takes its place, in which their number says the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.processor import attend
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches, and behind it image, byT5 and text tokens, each [B, T, C].

    In text to video the image tokens are all zero, which the model takes for padding.
    """
    config: Any = transformer.config
    grid = video_of(call, (config.patch_size_t, config.patch_size, config.patch_size))
    image = call.tensor("image_embeds", 3)
    masks = [call.tensor(name, 2) for name in ("encoder_attention_mask", "encoder_attention_mask_2")]
    text = image.shape[1] + sum(mask.shape[1] for mask in masks)
    valid = sum((mask.bool().sum(1) for mask in masks), (image != 0).any() * image.shape[1])
    return CallLayout(dataclasses.replace(grid, text=text), text_lens=valid.to(torch.int32))


def attend_video_and_text(
    processor: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`HunyuanVideo15AttnProcessor2_0` without its mask: video [B, N, C] and text [B, T, C] in and out.

    Padded text gets some output of its own, which nobody reads; with the mask it gets zeros.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    def split(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(2, (attn.heads, -1))  # [B, N, H, D]

    video_q, video_k = attn.norm_q(split(attn.to_q(hidden_states))), attn.norm_k(split(attn.to_k(hidden_states)))
    if image_rotary_emb is not None:
        video_q, video_k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (video_q, video_k))
    text_q, text_k = split(attn.add_q_proj(encoder_hidden_states)), split(attn.add_k_proj(encoder_hidden_states))
    if attn.norm_added_q is not None:
        text_q = attn.norm_added_q(text_q)
    if attn.norm_added_k is not None:
        text_k = attn.norm_added_k(text_k)
    video_v, text_v = split(attn.to_v(hidden_states)), split(attn.add_v_proj(encoder_hidden_states))

    pairs = ((video_q, text_q), (video_k, text_k), (video_v, text_v))
    q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
    joined = attend(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
    video, text = joined.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), 1)
    return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 1,000 tokens, 256 of glyphs and 729 of an image; the pipeline's own size follows `target_size`."""
    patch = transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]
    height, width = (720, 1280) if transformer["target_size"] >= 960 else (480, 848)
    return video_sizes(vae, patch, 121, height, width, text=1985)


FAMILY = Family(
    name="hunyuan_video_15",
    transformers=("HunyuanVideo15Transformer3DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="HunyuanVideo 1.5: text to video, image to video",
    sparse_calls={"HunyuanVideo15AttnProcessor2_0": attend_video_and_text},
)
