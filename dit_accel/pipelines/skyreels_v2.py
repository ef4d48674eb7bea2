"""SkyReels V2: text to video and image to video, with the blocks of Wan.

Diffusion forcing is refused: its frames are at different denoising steps in one call, and with causal blocks
(`num_frame_per_block` above 1) the model masks later frames.
"""

from __future__ import annotations

from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import video_alone
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches."""
    if call.get("enable_diffusion_forcing") or transformer.config.num_frame_per_block > 1:
        raise DitAccelError(
            "SkyReels V2 is called with diffusion forcing, where frames are at different denoising steps and may not "
            "see later ones; accelerate its text-to-video or image-to-video pipeline, or run this one dense."
        )
    return video_alone(transformer, call)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Rotary positions limit each axis."""
    return video_sizes(vae, transformer["patch_size"], 97, 544, 960, longest=transformer["rope_max_seq_len"])


FAMILY = Family(
    name="skyreels_v2",
    transformers=("SkyReelsV2Transformer3DModel",),
    attention=("blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="SkyReels V2: text to video, image to video (no diffusion forcing)",
)
