"""EasyAnimate: text, image and video to video, and control.

Text precedes the video in every block. Its padding is attended, as in training. Text of a second encoder follows the
first's. Inpainting and control latents are further channels of the same grid.
"""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, patch_of, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches within frames, behind text [B, T, C]."""
    text = call.length("encoder_hidden_states")
    if call.get("encoder_hidden_states_t5") is not None:
        text += call.length("encoder_hidden_states_t5")
    return CallLayout(video_of(call, patch_of(transformer.config), text, text_first=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """All but two stages of the VAE have a stride along time."""
    strides = dict(vae) | {"temporal_compression_ratio": 2 ** (len(vae["block_out_channels"]) - 2)}
    return video_sizes(strides, patch_of(transformer), 49, 512, 512, text=256, text_first=True)


FAMILY = Family(
    name="easyanimate",
    transformers=("EasyAnimateTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="EasyAnimate: text, image and video to video, control",
    recommended=TRAINING_FREE,
)
