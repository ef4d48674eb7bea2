"""LTX-2: the video's self-attention.

The audio stream's self-attention and the attention between the streams stay untouched. A layer whose attention the
model skips (spatio-temporal guidance) stays skipped. Keyframes and conditioning videos behind the video are dense both
ways. A mask over pairs of video tokens (IC-LoRA below full strength) is refused.
"""

from __future__ import annotations

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall, Preset
from dit_accel.pipelines.reading import packed_video
from dit_accel.pipelines.sizes import patch_of, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The packed video [B, N, C] and its sizes in tokens, or its coordinates."""
    if call.get("video_self_attention_mask") is not None:
        raise DitAccelError(
            "LTX-2 is called with a video_self_attention_mask, which weighs pairs of tokens in ways that accelerated "
            "attention cannot; call it without, or run it dense."
        )
    return packed_video(transformer, call)


RECOMMENDED = {
    "sla": Preset(
        config={"topk": 0.3},
        schedule={},
        source="TurboT2AV: LTX-2 19B at 1024x1792 with its fine-tuned weights; the share was chosen by eye",
    ),
}

FAMILY = Family(
    name="ltx2",
    transformers=("LTX2VideoTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=lambda transformer, vae: video_sizes(vae, patch_of(transformer), 121, 512, 768),
    summary="LTX-2: video with audio, keyframes, conditioning videos; the video's self-attention",
    recommended=TRAINING_FREE | RECOMMENDED,
)
