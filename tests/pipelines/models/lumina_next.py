"""Lumina-Next in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build(**config):
    """Of 2 blocks, with 2 query heads a key head."""
    from diffusers import LuminaNextDiT2DModel

    sizes = {"sample_size": 26, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    sizes |= {"multiple_of": 8, "cross_attention_dim": 16}
    return seeded(LuminaNextDiT2DModel, **(sizes | config))


def inputs(batch=2):
    """A latent in patches of 2 x 2."""
    noise = numbers()
    angles = noise(13, 11, 4)
    return {
        "hidden_states": noise(batch, 4, 26, 22),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": noise(batch, 7, 16),
        "encoder_mask": text_mask((7, 3), 7, batch),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


MODELS = [TinyModel("lumina_next", "t2i", build, inputs, TokenGrid(1, 13, 11), text_lens=(0, 0))]
