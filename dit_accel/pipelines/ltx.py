"""LTX-Video: self-attention (`attn1`) sees the packed video tokens, behind the keyframes of `LTXConditionPipeline`.

The call has the video's sizes, or the coordinates of all tokens.
"""

from __future__ import annotations

from dit_accel.pipelines.family import TRAINING_FREE, Family
from dit_accel.pipelines.reading import packed_video
from dit_accel.pipelines.sizes import patch_of, video_sizes

FAMILY = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=packed_video,
    sizes=lambda transformer, vae: video_sizes(vae, patch_of(transformer), 161, 512, 704),
    summary="LTX-Video: text and image to video, keyframes",
    recommended=TRAINING_FREE,
)
