"""HunyuanVideo: text to video, and image to video by latent concatenation or token replacement.

Text follows the video in dual and single blocks; its padding is masked per sample. Only the number of valid tokens in
the mask counts, as in the model. A replaced first frame (image to video) has its own modulation and is an ordinary
frame of the grid. The text refiner's attention stays the model's own.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall, Preset
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import patch_of, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches, before text [B, T, C] with its mask [B, T]."""
    grid = video_of(call, patch_of(transformer.config), call.length("encoder_hidden_states"))
    valid = call.tensor("encoder_attention_mask", 2).sum(1, dtype=torch.int32)
    return CallLayout(grid, text_lens=valid)


RECOMMENDED = {
    "radial": Preset(
        config={"decay": 0.95, "rule": "released", "sink": False},
        schedule={"dense_steps": 0.24},
        source="Radial Attention (arXiv:2506.19852), scripts/hunyuan_t2v_inference.sh: 117 frames of 768x1280, 12 of "
        "50 steps dense",
    ),
    "gna": Preset(
        config={"window": (0.6, 0.5, 0.3), "stride": (16, 8, 8)},
        schedule={"dense_steps": 0.3},
        source="GNA (arXiv:2504.16922): window 18x24x24 of 30x48x80 tokens, 15 of 50 steps dense",
    ),
}

FAMILY = Family(
    name="hunyuan_video",
    transformers=("HunyuanVideoTransformer3DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=lambda transformer, vae: video_sizes(vae, patch_of(transformer), 129, 720, 1280, text=256),
    summary="HunyuanVideo: text to video, image to video",
    recommended=TRAINING_FREE | RECOMMENDED,
)
