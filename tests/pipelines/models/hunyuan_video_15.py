"""HunyuanVideo 1.5 in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build():
    from diffusers import HunyuanVideo15Transformer3DModel

    sizes = {"in_channels": 6, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 10}
    sizes |= {"image_embed_dim": 8, "rope_axes_dim": (4, 4, 4), "mlp_ratio": 2.0}
    return seeded(HunyuanVideo15Transformer3DModel, **sizes)


def inputs(batch, image):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 6, 5, 7, 9),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, 7, 16),
        "encoder_attention_mask": text_mask((6, 2), 7, batch),
        "encoder_hidden_states_2": noise(batch, 5, 10),
        "encoder_attention_mask_2": text_mask((0, 3), 5, batch),
        "image_embeds": image * noise(batch, 4, 8),
    }


# The model asks whether the image is all zero, so that it does not compile as one graph. The text's order depends on
# its mask.
GRID = TokenGrid(5, 7, 9, text=16)
MODELS = [
    TinyModel("hunyuan_video_15", "t2v", build, lambda batch: inputs(batch, 0.0), GRID, (6, 5), compiles="blocks"),
    TinyModel("hunyuan_video_15", "i2v", build, lambda batch: inputs(batch, 1.0), GRID, (10, 9), compiles="blocks"),
]
