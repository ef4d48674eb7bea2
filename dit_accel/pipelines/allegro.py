"""Allegro.

Self-attention (`attn1`) sees the video tokens alone. Its pipeline passes no mask for them; a call with one is refused,
since the mask cuts out pixels of a padded frame.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, vae_frames, vae_pixels, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches."""
    if call.get("attention_mask") is not None:
        raise DitAccelError(
            "Allegro is called with an attention_mask over its video tokens, which accelerated attention cannot "
            "honour; call it without, as its pipeline does, or run it dense."
        )
    config: Any = transformer.config
    return CallLayout(video_of(call, (config.patch_size_t, config.patch_size, config.patch_size)))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """No frame stands alone."""
    patch = transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]
    pixels = vae_pixels(vae)
    frames, height, width = (transformer[f"sample_{axis}"] for axis in ("frames", "height", "width"))
    return video_sizes(vae, patch, frames * vae_frames(vae), height * pixels, width * pixels, frames_first=0)


FAMILY = Family(
    name="allegro",
    transformers=("AllegroTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="Allegro: text to video",
)
