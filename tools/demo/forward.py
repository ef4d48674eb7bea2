"""The training forward of a `WanTransformer3DModel`: the same mathematics as its own, less work, one extra output.

`WanPipeline` pads prompt embeddings with zeros to 512 positions and does not mask them in cross-attention. All padding
keys are equal, so `PaddedTextProcessor` keeps one and adds log(count) to its logit, which gives the same softmax. The
patch embedding is written as a matrix product, which is faster on a GPU than the convolution.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

PROMPT_LENGTH = 512  # `max_sequence_length` of WanPipeline
TEXT_SLOTS = 16  # positions kept in training; the last one stands for all the padding behind it


class SelfAttentionProcessor:
    """Self-attention of Wan with rotary positions on the fused kernel."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        query, key = (
            _rotate(norm(project(hidden_states).float()).unflatten(2, (attn.heads, -1)), *rotary_emb).type_as(value)
            for norm, project in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class PaddedTextProcessor:
    """Cross-attention of Wan over `TEXT_SLOTS` positions that equals the pipeline's over `PROMPT_LENGTH`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states).float()).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states).float()).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias = F.pad(query.new_zeros(TEXT_SLOTS - 1), (0, 1), value=math.log(PROMPT_LENGTH - TEXT_SLOTS + 1))
        query = query.type_as(value) * query.shape[-1] ** -0.5
        out = torch.softmax(query @ key.type_as(value).transpose(-1, -2) + bias, dim=-1).type_as(value) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def use_training_attention(transformer: WanTransformer3DModel) -> None:
    """Put both processors on every block; the text must then have `TEXT_SLOTS` positions, the last one padding."""
    for block in transformer.blocks:
        block.attn1.set_processor(SelfAttentionProcessor())
        block.attn2.set_processor(PaddedTextProcessor())


def predict(
    transformer: WanTransformer3DModel, latents: Tensor, timestep: Tensor, text: Tensor, watched: int
) -> tuple[Tensor, Tensor]:
    """The transformer's output, and the hidden states after block number `watched`.

    Args:
        latents: [B, C, t, h, w].
        timestep: [B], 0 to 1000.
        text: [B, TEXT_SLOTS, text_dim].
        watched: index of a block.

    Returns:
        [B, C, t, h, w] and [B, t * h/2 * w/2, dim].
    """
    _, down, across = transformer.config.patch_size
    blocks = latents.unflatten(4, (-1, across)).unflatten(3, (-1, down))  # [B, C, t, h/2, 2, w/2, 2]
    tokens = blocks.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)  # [B, N, C * 4]
    embedding = transformer.patch_embedding
    hidden = F.linear(tokens, embedding.weight.flatten(1), embedding.bias).clone()  # a view compiles apart
    cos, sin = transformer.rope(latents)
    rotary = (cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous())
    time, modulation, text, _ = transformer.condition_embedder(timestep, text)
    modulation = modulation.unflatten(1, (6, -1)).clone()
    for index, block in enumerate(transformer.blocks):
        hidden = block(hidden, text, modulation, rotary)
        if index == watched:
            seen = hidden
    shift, scale = (transformer.scale_shift_table + time[:, None]).chunk(2, dim=1)
    hidden = (transformer.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    out = transformer.proj_out(hidden).unflatten(2, (down, across, -1))  # [B, N, 2, 2, C]
    _, _, frames, height, width = latents.shape
    out = out.unflatten(1, (frames, height // down, width // across)).permute(0, 6, 1, 2, 4, 3, 5)
    return out.flatten(5, 6).flatten(3, 4), seen


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on neighbouring pairs; x [B, N, heads, D], cos and sin [1, N, 1, D/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
