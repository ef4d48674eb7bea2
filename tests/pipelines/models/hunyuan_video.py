"""HunyuanVideo in small."""

import functools

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid

LENGTHS = (11, 4)


def build(**config):
    from diffusers import HunyuanVideoTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16}
    sizes |= {"pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4), "mlp_ratio": 2.0}
    return seeded(HunyuanVideoTransformer3DModel, **(sizes | config))


def inputs(batch=2):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, 13, 16),
        "encoder_attention_mask": text_mask(LENGTHS, 13, batch),
        "pooled_projections": noise(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


GRID = TokenGrid(5, 7, 9, text=13)
MODELS = [
    TinyModel("hunyuan_video", "t2v", build, inputs, GRID, LENGTHS),
    TinyModel(
        "hunyuan_video",
        "i2v",
        functools.partial(build, image_condition_type="token_replace", guidance_embeds=False),
        inputs,
        GRID,
        LENGTHS,
    ),
]
