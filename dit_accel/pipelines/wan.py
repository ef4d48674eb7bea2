"""Wan 2.1 and 2.2, text to video and image to video.

Self-attention (`attn1`) sees the video tokens alone; text and, in Wan 2.1 image-to-video, image tokens enter through
cross-attention, which is left alone. Wan 2.2 A14B has two transformers on one trajectory, and TI2V-5B one timestep per
token.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.pipelines.family import Call, Family, Layout, Preset, patch_grid


def layout(transformer: nn.Module, call: Call) -> Layout:
    """The latent [B, C, F, H, W], cut into patches."""
    config: Any = transformer.config
    frames, height, width = call.tensor("hidden_states", 5).shape[2:]
    return Layout(patch_grid((frames, height, width), tuple(config.patch_size)))


RECOMMENDED = {
    "radial": Preset(
        config={"decay": 0.2},
        schedule={"dense_steps": 12, "dense_layers": 1},
        source="Radial Attention, scripts/wan_t2v_inference.sh: Wan2.1-14B, 69 frames of 768x1280, 50 steps",
    ),
}

FAMILY = Family(
    name="wan",
    transformers=("WanTransformer3DModel",),
    attention=("blocks.*.attn1",),
    layout=layout,
    summary="Wan 2.1 and 2.2: text to video, image to video",
    recommended=RECOMMENDED,
)
