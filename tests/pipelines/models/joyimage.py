"""JoyImage-Edit in small."""

import math

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build(**config):
    """JoyImage-Edit of 2 blocks."""
    from diffusers import JoyImageEditTransformer3DModel

    sizes = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 20, "num_layers": 2}
    return seeded(JoyImageEditTransformer3DModel, **(sizes | {"rope_dim_list": [4, 6, 6]} | config))


def inputs(images=3, height=14, width=18, batch=2):
    """Latents of as many images, in patches of 2 x 2; the made one last."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, images, 4, 1, height, width, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 13, 20, generator=generator),
    }


def plus(**config):
    """JoyImage-Edit-Plus of 2 blocks."""
    from diffusers import JoyImageEditPlusTransformer3DModel

    sizes = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 20, "num_layers": 2}
    return seeded(JoyImageEditPlusTransformer3DModel, **(sizes | {"rope_dim_list": [4, 6, 6]} | config))


def packed(*images, batch=2):
    """Patches of images with as many tokens, the made one first."""
    noise = numbers()
    return {
        "hidden_states": noise(batch, sum(map(math.prod, images)), 4, 1, 2, 2),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, 13, 20),
        "encoder_hidden_states_mask": text_mask((13, 6), 13, batch),
        "shape_list": [list(images)] * batch,
    }


MODELS = [
    TinyModel("joyimage", "edit", build, lambda batch: inputs(batch=batch), TokenGrid(3, 7, 9, text=13)),
    TinyModel(
        "joyimage",
        "edit-plus",
        plus,
        lambda batch: packed((1, 7, 9), (1, 7, 9), (1, 7, 9), (1, 3, 4), batch=batch),
        TokenGrid(3, 7, 9, text=13, conditioning=12),
        text_lens=(13, 6),
    ),
]
