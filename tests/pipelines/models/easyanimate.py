"""EasyAnimate in small."""

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid


def build():
    """One block with streams of their own for text and video, and one where they share weights."""
    from diffusers import EasyAnimateTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2}
    sizes |= {"num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": 16, "text_embed_dim_t5": 10}
    return seeded(EasyAnimateTransformer3DModel, **sizes)


def inputs(batch=2):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, 9, 16),
        "encoder_hidden_states_t5": noise(batch, 4, 10),
    }


MODELS = [TinyModel("easyanimate", "t2v", build, inputs, TokenGrid(5, 7, 9, text=13, text_first=True))]
