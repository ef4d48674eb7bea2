"""Hunyuan-DiT: self-attention (`attn1`) sees the image alone; text enters through cross-attention."""

from __future__ import annotations

from dit_accel.pipelines.family import CallLayout, Family
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import square_sizes

FAMILY = Family(
    name="hunyuan_dit",
    transformers=("HunyuanDiT2DModel",),
    attention=("blocks.*.attn1",),
    layout=lambda transformer, call: CallLayout(image_of(call, transformer.config.patch_size)),
    sizes=square_sizes,
    summary="Hunyuan-DiT 1.0 to 1.2",
)
