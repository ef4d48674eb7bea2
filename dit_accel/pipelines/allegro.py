"""Allegro: self-attention (`attn1`) sees the video tokens alone.

Its pipeline passes no mask over the video. A call with one is refused: such a mask cuts pixels off a padded frame.
"""

from __future__ import annotations

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, ModelInputs, video_family
from dit_accel.pipelines.reading import video_alone
from dit_accel.pipelines.sharding import Sharding
from dit_accel.pipelines.sizes import Config, Sizes, patch_of, vae_frames, vae_pixels, video_sizes


def layout(transformer: nn.Module, call: ModelInputs) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches."""
    if call.get("attention_mask") is not None:
        raise DitAccelError(
            "Allegro is called with an attention_mask over its video tokens, which accelerated attention cannot "
            "honour. Call it without, as its pipeline does, or run it dense."
        )
    return video_alone(transformer, call)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Every token holds the same number of frames; the first frame is not separate."""
    pixels = vae_pixels(vae)
    frames, height, width = (transformer[f"sample_{axis}"] for axis in ("frames", "height", "width"))
    default = frames * vae_frames(vae), height * pixels, width * pixels
    return video_sizes(vae, patch_of(transformer), *default, frames_first=0)


FAMILY = video_family(
    name="allegro",
    transformers=("AllegroTransformer3DModel",),
    layout=layout,
    sizes=sizes,
    # positions: tables of each axis, and every token's place on it
    sharding=Sharding.of_blocks("transformer_blocks", output="proj_out", image_rotary_emb=(None, (1, 1, 1))),
    summary="Allegro: text to video",
)
