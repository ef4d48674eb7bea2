"""JoyImage-Edit in small."""

import torch
from tiny_models import TinyModel, seeded

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


MODELS = [TinyModel("joyimage", "edit", build, lambda batch: inputs(batch=batch), TokenGrid(3, 7, 9, text=13))]
