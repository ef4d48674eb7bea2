"""LTX-Video in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build():
    from diffusers import LTXVideoTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"cross_attention_dim": 24, "num_layers": 2, "caption_channels": 16}
    return seeded(LTXVideoTransformer3DModel, **sizes)


def inputs(batch=2):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 5 * 7 * 9, 4),
        "encoder_hidden_states": noise(batch, 7, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask((7, 3), 7, batch),
        "num_frames": 5,
        "height": 7,
        "width": 9,
    }


MODELS = [TinyModel("ltx", "t2v", build, inputs, TokenGrid(5, 7, 9))]
