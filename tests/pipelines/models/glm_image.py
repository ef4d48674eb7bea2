"""GLM-Image in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """GLM-Image of 2 blocks."""
    from diffusers import GlmImageTransformer2DModel

    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"text_embed_dim": 20, "time_embed_dim": 16, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 10}
    return seeded(GlmImageTransformer2DModel, **(sizes | config))


def inputs(height=26, width=22, batch=2):
    """A latent in patches of 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 13, 20, generator=generator),
        "prior_token_id": torch.randint(10, (batch, 143), generator=generator),
        "prior_token_drop": torch.zeros(batch, 143, dtype=torch.bool),
        "timestep": torch.full((batch,), 500.0),
        "target_size": torch.tensor([[208.0, 176.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


MODELS = [
    TinyModel(
        "glm_image", "t2i", build, lambda batch: inputs(batch=batch), TokenGrid(1, 13, 11, text=13, text_first=True)
    )
]
