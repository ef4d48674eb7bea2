"""Lumina-Image 2.0 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """Lumina 2 of 2 layers and 1 refiner layer of each kind, with 2 query heads a key head."""
    from diffusers import Lumina2Transformer2DModel

    sizes = {"sample_size": 32, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "cap_feat_dim": 20}
    sizes |= {"axes_dim_rope": (4, 6, 6), "axes_lens": (32, 32, 32)}
    return seeded(Lumina2Transformer2DModel, **(sizes | config))


def inputs(height=26, width=22, valid=(13, 6), text=13, batch=2):
    """A latent in patches of 2 x 2; `valid`: caption tokens of the samples in turn."""
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor([valid[sample % len(valid)] for sample in range(batch)])
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=generator),
        "encoder_attention_mask": (torch.arange(text) < lens[:, None]).long(),
    }


GRID = TokenGrid(1, 13, 11, text=13, text_first=True)
MODELS = [
    TinyModel(
        "lumina2",
        "t2i",
        build,
        lambda batch: inputs(batch=batch),
        GRID,
        text_lens=(13, 6),
        compiles="no",
        # The second sample's image starts behind its 6 caption tokens, and its padding lies behind the image.
        rows=torch.stack((torch.arange(156), torch.tensor([*range(6), *range(149, 156), *range(6, 149)]))),
        lengths=(156, 156),
    ),
    TinyModel(
        "lumina2",
        "one-length",
        build,
        lambda batch: inputs(valid=(13,), batch=batch),
        GRID,
        compiles="no",
        lengths=(156, 156),
    ),
]
