"""Kandinsky 5: self-attention of the visual blocks sees image or video alone; text enters through cross-attention."""

from __future__ import annotations

from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.sizes import patch_of, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, F, H, W, C], cut into patches."""
    if call.get("sparse_params") is not None:
        raise DitAccelError(
            f"{call.owner} runs its own sparse attention (NABLA) with tokens in another order, so there is no dense "
            "attention to replace. Use a checkpoint with attention_type='regular', or leave the model as it is."
        )
    return CallLayout(patch_grid(call.tensor("hidden_states", 5).shape[1:4], transformer.config.patch_size))


FAMILY = Family(
    name="kandinsky5",
    transformers=("Kandinsky5Transformer3DModel",),
    attention=("visual_transformer_blocks.*.self_attention",),
    layout=layout,
    sizes=lambda transformer, vae: video_sizes(vae, patch_of(transformer), 121, 512, 768),
    summary="Kandinsky 5 (without its own sparse attention)",
    head_dim=lambda attention: int(attention.query_norm.normalized_shape[0]),
    recommended=TRAINING_FREE,
)
