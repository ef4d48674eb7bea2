"""LTX-Video.

Self-attention (`attn1`) sees the packed video tokens alone, and before them, in `LTXConditionPipeline`, those of
keyframes that are given. The call says the video's sizes, or the coordinates of all tokens.
"""

from __future__ import annotations

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import packed_video
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The packed video [B, N, C] and its sizes in tokens or its coordinates."""
    return packed_video(call)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """From the patch and the VAE's strides."""
    patch = transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]
    return video_sizes(vae, patch, 161, 512, 704)


FAMILY = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="LTX-Video: text and image to video, keyframes",
)
