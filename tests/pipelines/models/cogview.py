"""CogView3-Plus and CogView4 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid

SIZES = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
SIZES |= {"text_embed_dim": 20, "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 32, "sample_size": 32}


def cogview3(**config):
    """CogView3-Plus of 2 blocks."""
    from diffusers import CogView3PlusTransformer2DModel

    return seeded(CogView3PlusTransformer2DModel, **(SIZES | config))


def cogview4(**config):
    """CogView4 of 2 blocks."""
    from diffusers import CogView4Transformer2DModel

    return seeded(CogView4Transformer2DModel, **(SIZES | {"rope_axes_dim": (32, 32)} | config))


def inputs(height=26, width=22, batch=2):
    """A latent in patches of 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 13, 20, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "original_size": torch.tensor([[208.0, 176.0]]).repeat(batch, 1),
        "target_size": torch.tensor([[208.0, 176.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


GRID = TokenGrid(1, 13, 11, text=13, text_first=True)
MODELS = [
    TinyModel("cogview", "cogview3-plus", cogview3, lambda batch: inputs(batch=batch), GRID),
    TinyModel("cogview", "cogview4", cogview4, lambda batch: inputs(batch=batch), GRID),
]
