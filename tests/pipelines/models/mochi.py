"""Mochi in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid

LENGTHS = (11, 4)


def build():
    from diffusers import MochiTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 12}
    sizes |= {"in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 13}
    return seeded(MochiTransformer3DModel, **sizes)


def inputs(batch=2):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "encoder_hidden_states": noise(batch, 13, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(LENGTHS, 13, batch).bool(),
    }


MODELS = [TinyModel("mochi", "t2v", build, inputs, TokenGrid(5, 7, 9, text=13), LENGTHS)]
