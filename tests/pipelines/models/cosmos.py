"""Cosmos in small."""

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid

SIZES = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SIZES |= {"mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (5, 32, 32)}
# Padding masks need torchvision; learned positions cannot run in fp64, to which the checks compare.
SIZES |= {"concat_padding_mask": False, "extra_pos_embed_type": None}
GRID = TokenGrid(5, 7, 9)


def build():
    from diffusers import CosmosTransformer3DModel

    return seeded(CosmosTransformer3DModel, **SIZES)


def build_25():
    """As Predict 2.5: a projection of the text, and image context beside it."""
    from diffusers import CosmosTransformer3DModel

    context = {"img_context_dim_in": 10, "img_context_dim_out": 32, "img_context_num_tokens": 3}
    context |= {
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": 20,
        "encoder_hidden_states_channels": 16,
    }
    return seeded(CosmosTransformer3DModel, **SIZES, **context)


def inputs(batch=2):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": noise(batch, 7, 16),
        "fps": 24,
    }


def inputs_25(batch):
    """One timestep per frame."""
    noise = numbers(2)
    timestep = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.5]).expand(batch, 1, 5).reshape(batch, 1, 5, 1, 1)
    return inputs(batch) | {"timestep": timestep, "encoder_hidden_states": (noise(batch, 7, 20), noise(batch, 3, 10))}


MODELS = [
    TinyModel("cosmos", "1", build, inputs, GRID),
    TinyModel("cosmos", "2.5", build_25, inputs_25, GRID),
]
