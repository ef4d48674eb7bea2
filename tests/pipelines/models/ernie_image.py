"""ERNIE-Image in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """ERNIE-Image of 2 layers."""
    from diffusers import ErnieImageTransformer2DModel

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "in_channels": 4}
    sizes |= {"out_channels": 4, "patch_size": 1, "text_in_dim": 20, "rope_axes_dim": (4, 6, 6)}
    return seeded(ErnieImageTransformer2DModel, **(sizes | config))


def inputs(valid=(13, 6), text=13, batch=2):
    """A latent of 13 x 11; `valid`: text tokens of the samples in turn."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 13, 11, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "text_bth": torch.randn(batch, text, 20, generator=generator),
        "text_lens": torch.tensor([valid[sample % len(valid)] for sample in range(batch)]),
    }


MODELS = [
    TinyModel(
        "ernie_image",
        "t2i",
        build,
        lambda batch: inputs(batch=batch),
        TokenGrid(1, 13, 11, text=13),
        text_lens=(13, 6),
    )
]
