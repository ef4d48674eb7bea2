"""Wan 2.1 and 2.2: text and image to video, VACE, Animate; and ChronoEdit, which has the same blocks.

Self-attention (`attn1`) sees the video tokens alone. Text enters through cross-attention, which stays untouched, as do
the image tokens of Wan 2.1's image-to-video. Wan 2.2 A14B has two transformers on one trajectory, TI2V-5B one timestep
per token. VACE's control blocks attend over the same grid as the video. Animate's conditioning image is the first frame
of its latent; its face adapters are cross-attention.
"""

from __future__ import annotations

from dit_accel.pipelines.anchors import in_latent
from dit_accel.pipelines.family import TRAINING_FREE, Family, Preset
from dit_accel.pipelines.reading import video_alone
from dit_accel.pipelines.sizes import Config, Sizes, video_sizes


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Rotary positions limit each axis; `WanPipeline.check_inputs` wants multiples of 16."""
    longest = transformer["rope_max_seq_len"]
    return video_sizes(vae, transformer["patch_size"], 81, 480, 832, longest=longest, multiple=16)


RECOMMENDED = {
    "radial": Preset(
        config={"decay": 0.2, "rule": "released"},
        schedule={"dense_steps": 0.24, "dense_layers": 1},
        source="Radial Attention (arXiv:2506.19852), scripts/wan_t2v_inference.sh: Wan2.1-14B, 69 frames of 768x1280, "
        "12 of 50 steps dense",
    ),
    "sla": Preset(
        config={"topk": 0.1, "block_q": 128},
        schedule={},
        source="TurboDiffusion: --sla_topk 0.1 for its fine-tuned Wan2.1 and Wan2.2, 128 queries and 64 keys a block "
        "(turbodiffusion/inference/modify_model.py); needs fine-tuned weights",
    ),
    "rectified": Preset(
        config={"drop": 0.75},
        schedule={"dense_steps": 0.2, "dense_layers": 2},
        source="Rectified SpaAttn (arXiv 2511.19835): Wan2.1 with drop 0.75 and layers 0 and 1 dense; dense steps as "
        "for Sol-Attn (arXiv 2607.24027)",
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
    "rectified": Preset(
        config={"drop": 0.85},
        schedule={"dense_steps": 0.2, "dense_layers": 2},
        source="Rectified SpaAttn (arXiv 2511.19835): Wan2.2-A14B with drop 0.85 and layers 0 and 1 of both dense; "
        "dense steps as for Sol-Attn (arXiv 2607.24027)",
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
    layout=video_alone,
    sizes=sizes,
    summary="Wan 2.1 and 2.2: text to video, image to video, VACE, Animate; ChronoEdit",
    recommended=TRAINING_FREE | RECOMMENDED,
    recommended_pair=RECOMMENDED_PAIR,
    extend=in_latent,
)
