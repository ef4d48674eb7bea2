"""Wan 2.1 and 2.2: text and image to video, VACE, Animate; and ChronoEdit, which is built like them.

Self-attention (`attn1`) sees the video tokens alone; text and, in image-to-video of Wan 2.1, image tokens enter through
cross-attention, which is left alone. Wan 2.2 A14B has two transformers on one trajectory, and TI2V-5B one timestep per
token. VACE's control blocks attend over as many tokens as the video has, on the same grid. Animate's reference image is
the first frame of its latent; its face adapters are cross-attention.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall, Preset
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches."""
    config: Any = transformer.config
    return CallLayout(video_of(call, config.patch_size))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """From the patch and the VAE's strides."""
    return video_sizes(vae, transformer["patch_size"], 81, 480, 832, longest=transformer["rope_max_seq_len"])


RECOMMENDED = {
    "radial": Preset(
        config={"decay": 0.2, "rule": "released"},
        schedule={"dense_steps": 0.24, "dense_layers": 1},
        source="Radial Attention (arXiv:2506.19852), scripts/wan_t2v_inference.sh: Wan2.1-14B, 69 frames of 768x1280, "
        "12 of 50 steps dense",
    ),
    "sla": Preset(
        config={"topk": 0.1},
        schedule={},
        source="TurboDiffusion: --sla_topk 0.1 for its fine-tuned Wan2.1 and Wan2.2; needs fine-tuned weights",
    ),
}

# Of Wan 2.2 A14B, whose two transformers run on one trajectory.
RECOMMENDED_PAIR = {
    "radial": Preset(
        config={"decay": 0.8, "rule": "released", "block": 64},
        schedule={"dense_steps": 11 / 40, "dense_layers": 1},
        source="Radial Attention (arXiv:2506.19852), scripts/wan_22_t2v_inference.sh: Wan2.2-A14B, 77 frames of "
        "768x1280, 11 of 40 steps dense, blocks of 64 tokens",
    ),
}

FAMILY = Family(
    name="wan",
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    attention=("vace_blocks.*.attn1", "blocks.*.attn1"),
    layout=layout,
    sizes=sizes,
    summary="Wan 2.1 and 2.2: text to video, image to video, VACE, Animate; ChronoEdit",
    recommended=RECOMMENDED,
    recommended_pair=RECOMMENDED_PAIR,
)
