"""Training-only attention processors for a `WanTransformer3DModel` on a CPU; the same mathematics, less work.

`WanPipeline` pads prompt embeddings with zeros to 512 positions and does not mask them in cross-attention. All padding
keys are equal, so `PaddedTextProcessor` keeps one and adds log(count) to its logit, which gives the same softmax.
`MatmulProcessor` writes self-attention as bfloat16 matrix products, which trains faster on a CPU than the fused kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

PROMPT_LENGTH = 512  # `max_sequence_length` of WanPipeline
TEXT_SLOTS = 16  # positions kept in training; the last one stands for all the padding behind it


class MatmulProcessor:
    """Self-attention of Wan with rotary positions as softmax(q k^T) v in the dtype of the projections."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        query = _rotate(query, *rotary_emb).type_as(value).transpose(1, 2)  # [B, heads, N, head_dim]
        key = _rotate(key, *rotary_emb).type_as(value).transpose(1, 2)
        query = query * query.shape[-1] ** -0.5
        out = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class PaddedTextProcessor:
    """Cross-attention of Wan over `TEXT_SLOTS` positions that equals the pipeline's over `PROMPT_LENGTH`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias = F.pad(query.new_zeros(TEXT_SLOTS - 1), (0, 1), value=math.log(PROMPT_LENGTH - TEXT_SLOTS + 1))
        query = query.type_as(value) * query.shape[-1] ** -0.5
        out = torch.softmax(query @ key.type_as(value).transpose(-1, -2) + bias, dim=-1).type_as(value) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def use_fast_attention(transformer: WanTransformer3DModel) -> None:
    """Put both processors on every block; the text must then have `TEXT_SLOTS` positions, the last one padding."""
    for block in transformer.blocks:
        block.attn1.set_processor(MatmulProcessor())
        block.attn2.set_processor(PaddedTextProcessor())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on neighbouring pairs; x [B, N, heads, D], cos and sin [1, N, 1, D] with equal pairs."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
