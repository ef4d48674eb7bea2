"""HunyuanVideo: text to video, and image to video by latent concatenation or token replacement.

Text stands behind the video in dual and single blocks alike, and its padding is masked per sample. The model takes the
number of valid text tokens, wherever its mask has them, and so do we. A replaced first frame (image to video) has its
own modulation and lies in the grid like any other. The text refiner's attention stays the model's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall, Preset
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches, and behind it text [B, T, C] with its mask [B, T]."""
    config: Any = transformer.config
    grid = video_of(call, (config.patch_size_t, config.patch_size, config.patch_size))
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    valid = call.tensor("encoder_attention_mask", 2).sum(1, dtype=torch.int32)
    return CallLayout(dataclasses.replace(grid, text=text), text_lens=valid)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """From the patch and the VAE's strides."""
    patch = transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]
    return video_sizes(vae, patch, 129, 720, 1280, text=256)


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
    sizes=sizes,
    summary="HunyuanVideo: text to video, image to video",
    recommended=RECOMMENDED,
)
