"""Bria 3.2 and FIBO in small."""

import tiny_models
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """Bria of 1 dual and 2 single blocks."""
    from diffusers import BriaTransformer2DModel

    sizes = {"in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": [4, 6, 6]}
    return seeded(BriaTransformer2DModel, **(sizes | config))


def inputs(batch=2):
    """A call as of FLUX.1."""
    return tiny_models.module("flux").unpooled(batch)


def fibo(**config):
    """FIBO of 1 dual and 2 single blocks."""
    from diffusers import BriaFiboTransformer2DModel

    sizes = {"in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": [4, 6, 6], "text_encoder_dim": 12}
    return seeded(BriaFiboTransformer2DModel, **(sizes | config))


def masked(batch=2):
    """The mask, and the text encoder's states for each block, are FIBO's own."""
    noise, call = numbers(2), tiny_models.module("flux").masked(batch=batch)
    mask = call.pop("attention_mask")[:, None, None, :]
    states = [noise(batch, 13, 12) for _ in range(3)]
    return call | {"text_encoder_layers": states, "joint_attention_kwargs": {"attention_mask": mask}}


GRID = TokenGrid(1, 13, 11, text=13, text_first=True)
MODELS = [
    TinyModel("bria", "t2i", build, inputs, GRID),
    TinyModel("bria", "fibo", fibo, masked, GRID, text_lens=(13, 6)),
]
