"""Nucleus-Image in small."""

import tiny_models
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """Nucleus-Image of 2 blocks with fewer key heads than heads; every expert takes every token, so none is chosen."""
    from diffusers import NucleusMoEImageTransformer2DModel

    sizes = {"in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6)}
    experts = {"num_experts": 2, "moe_intermediate_dim": 16, "capacity_factors": 2.0}
    sizes |= experts | {"dense_moe_strategy": "leave_first_block_dense"}
    return seeded(NucleusMoEImageTransformer2DModel, **(sizes | config))


def inputs(batch=2):
    """As of Qwen-Image, with one shape for all."""
    call = tiny_models.module("qwen_image").inputs((13, 11), valid=(13, 6), batch=batch)
    return call | {"img_shapes": [(1, 13, 11)] * batch}


GRID = TokenGrid(1, 13, 11, text=13)
MODELS = [TinyModel("nucleus_image", "t2i", build, inputs, GRID, text_lens=(13, 6), queries=GRID.visual)]
