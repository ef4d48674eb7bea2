"""CogVideoX 1.0 and 1.5, and ConsisID, which has the blocks of 1.0.

Text precedes the video in every block. Its padding is attended, as in training. CogVideoX 1.5 also cuts the latent into
patches along time. ConsisID's face features enter through cross-attention between the blocks, which stays untouched.
"""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.sizes import Config, Sizes, patch_of, vae_pixels, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, F, C, H, W], cut into patches, behind text [B, T, C]."""
    _, frames, _, height, width = call.tensor("hidden_states", 5).shape
    text = call.length("encoder_hidden_states")
    return CallLayout(patch_grid((frames, height, width), patch_of(transformer.config), text, text_first=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """In version 1.5 a token holds two latent frames; the pipeline pads the latent by one frame."""
    pixels, text = vae_pixels(vae), transformer["max_text_seq_length"]
    default = transformer["sample_frames"], transformer["sample_height"] * pixels, transformer["sample_width"] * pixels
    return video_sizes(vae, patch_of(transformer), *default, text=text, text_first=True)


FAMILY = Family(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="CogVideoX 1.0 and 1.5: text, image and video to video, control; ConsisID",
    recommended=TRAINING_FREE,
)
