"""SkyReels V2 in small."""

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid


def build():
    from diffusers import SkyReelsV2Transformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    sizes |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64}
    return seeded(SkyReelsV2Transformer3DModel, **sizes)


def inputs(batch=2):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, 7, 16),
    }


MODELS = [TinyModel("skyreels_v2", "t2v", build, inputs, TokenGrid(5, 7, 9))]
