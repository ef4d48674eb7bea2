"""Bria 3.2 in small."""

import tiny_models
from tiny_models import TinyModel, seeded

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


MODELS = [TinyModel("bria", "t2i", build, inputs, TokenGrid(1, 13, 11, text=13, text_first=True))]
