"""Stable Diffusion 3 and 3.5 medium in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """SD3 of 3 blocks."""
    from diffusers import SD3Transformer2DModel

    sizes = {"sample_size": 32, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "caption_projection_dim": 32}
    return seeded(SD3Transformer2DModel, **(sizes | {"pooled_projection_dim": 12, "pos_embed_max_size": 32} | config))


def inputs(height=26, width=22, text=13, batch=2):
    """A latent in patches of 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=generator),
        "pooled_projections": torch.randn(batch, 12, generator=generator),
        "timestep": torch.full((batch,), 500.0),
    }


GRID = TokenGrid(1, 13, 11, text=13)
MODELS = [
    TinyModel("sd3", "t2i", build, lambda batch: inputs(batch=batch), GRID),
    TinyModel(
        "sd3",
        "3.5-medium",
        lambda: build(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        lambda batch: inputs(batch=batch),
        GRID,
    ),
]
