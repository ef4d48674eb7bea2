"""AuraFlow in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """AuraFlow of 1 joint and 2 single blocks."""
    from diffusers import AuraFlowTransformer2DModel

    sizes = {"sample_size": 32, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2}
    sizes |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 20}
    return seeded(AuraFlowTransformer2DModel, **(sizes | {"caption_projection_dim": 32} | config))


def inputs(height=26, width=22, batch=2):
    """A latent in patches of 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 20, generator=generator),
        "timestep": torch.full((batch,), 0.5),
    }


# The model puts 8 registers of its own before the text.
MODELS = [
    TinyModel(
        "aura_flow", "t2i", build, lambda batch: inputs(batch=batch), TokenGrid(1, 13, 11, text=13, text_first=True)
    )
]
