"""SkyReels V2: text to video and image to video, built like Wan.

Diffusion forcing is refused: its frames are at different denoising steps in one call, and with causal blocks
(`num_frame_per_block` above 1) the model masks later frames, which the methods' masks know nothing of.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches."""
    config: Any = transformer.config
    if call.get("enable_diffusion_forcing") or config.num_frame_per_block > 1:
        raise DitAccelError(
            "SkyReels V2 is called with diffusion forcing, where frames are at different denoising steps and may not "
            "see later ones; accelerate its text-to-video or image-to-video pipeline, or run this one dense."
        )
    return CallLayout(video_of(call, config.patch_size))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """From the patch and the VAE's strides."""
    return video_sizes(vae, transformer["patch_size"], 97, 544, 960, longest=transformer["rope_max_seq_len"])


FAMILY = Family(
    name="skyreels_v2",
    transformers=("SkyReelsV2Transformer3DModel",),
    attention=("blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="SkyReels V2: text to video, image to video (no diffusion forcing)",
)
