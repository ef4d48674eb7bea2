"""LTX-Video.

Self-attention (`attn1`) sees the packed video tokens alone; the call says their sizes. Where conditioning frames are
packed in front (`LTXConditionPipeline`), it says coordinates instead, of no regular grid, and is refused.
"""

from __future__ import annotations

from torch import nn

from dit_accel.pipelines.family import Call, Family, Layout
from dit_accel.pipelines.reading import stated_grid


def layout(transformer: nn.Module, call: Call) -> Layout:
    """The packed video [B, N, C] and its num_frames, height and width in tokens."""
    return Layout(stated_grid(call))


FAMILY = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    summary="LTX-Video: text to video, image to video",
)
