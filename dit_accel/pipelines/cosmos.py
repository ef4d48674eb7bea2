"""Cosmos 1, Predict 2 and 2.5: worlds from text, images and video, and images from text.

Self-attention (`attn1`) sees the video tokens alone; text and image features enter through cross-attention. The
timestep is a function of sigma that differs between the generations, so a bare transformer needs `set_step`.
"""

from __future__ import annotations

from dit_accel.pipelines.family import TRAINING_FREE, Family, Preset
from dit_accel.pipelines.reading import video_alone
from dit_accel.pipelines.sizes import Config, Sizes, vae_frames, video_sizes


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Cosmos 1 makes 121 frames, 8 a latent; Predict 2 makes 93, 4 a latent."""
    return video_sizes(vae, transformer["patch_size"], 121 if vae_frames(vae) == 8 else 93, 704, 1280)


RECOMMENDED = {
    "gna": Preset(
        config={"window": ("full", 32 / 44, 0.6), "stride": (1, 8, 16)},
        schedule={"dense_steps": 12 / 35},
        source="GNA (arXiv:2504.16922): Cosmos-7B, window 16x32x48 of 16x44x80 tokens, 12 of 35 steps dense",
    ),
}

FAMILY = Family(
    name="cosmos",
    transformers=("CosmosTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=video_alone,
    sizes=sizes,
    summary="Cosmos 1, Predict 2 and 2.5: text, image and video to world, text to image",
    timestep_scale=None,
    recommended=TRAINING_FREE | RECOMMENDED,
)
