"""PRX in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build(**config):
    """PRX of 2 blocks."""
    from diffusers import PRXTransformer2DModel

    sizes = {"in_channels": 4, "context_in_dim": 20, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    return seeded(PRXTransformer2DModel, **(sizes | config))


def inputs(batch=2):
    """A latent in patches of 2 x 2."""
    noise = numbers()
    return {
        "hidden_states": noise(batch, 4, 26, 22),
        "encoder_hidden_states": noise(batch, 13, 20),
        "timestep": torch.full((batch,), 0.5),
        "attention_mask": text_mask((13, 6), 13, batch).bool(),
    }


GRID = TokenGrid(1, 13, 11, text=13, text_first=True)
MODELS = [TinyModel("prx", "t2i", build, inputs, GRID, text_lens=(13, 6), queries=GRID.visual)]
