"""SkyReels V2: text to video and image to video, with the blocks of Wan.

In diffusion forcing the frames of one call are at different denoising steps. The schedule follows the largest timestep,
that of the frame furthest behind. With causal blocks (`num_frame_per_block` above 1) the model masks later frames; such
a model is refused.
"""

from __future__ import annotations

from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import video_alone
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches."""
    block = transformer.config.num_frame_per_block
    if block > 1:
        raise DitAccelError(
            f"This SkyReels V2 has num_frame_per_block={block}: its frames may not see later blocks, which "
            "sparse attention cannot honour. Use one frame a block (causal_block_size=1), or run it dense."
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
    summary="SkyReels V2: text to video, image to video, diffusion forcing (without causal blocks)",
    recommended=TRAINING_FREE,
)
