"""Allegro in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid

GRID = TokenGrid(5, 7, 9)


def build():
    from diffusers import AllegroTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sizes |= {"cross_attention_dim": 24, "caption_channels": 16}
    return seeded(AllegroTransformer3DModel, **sizes)


def inputs(batch=2):
    """Rotary tables for each axis, and every token's place on it."""
    noise, places = numbers(), GRID.coordinates().T
    angles = [noise(length, 2).repeat(1, 2) for length in GRID.shape]
    tables = tuple((angle.cos(), angle.sin()) for angle in angles)
    return {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "encoder_hidden_states": noise(batch, 7, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": text_mask((7, 3), 7, batch),
        "image_rotary_emb": (tables, tuple(places[:, None])),
    }


MODELS = [TinyModel("allegro", "t2v", build, inputs, GRID)]
