"""Qwen-Image in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """Qwen-Image of 2 blocks."""
    from diffusers import QwenImageTransformer2DModel

    sizes = {"in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6)}
    return seeded(QwenImageTransformer2DModel, **(sizes | config))


def inputs(*images, valid=None, text=13, batch=2):
    """Packed images of these (height, width), the made one first; `valid`: text tokens of the samples in turn."""
    generator = torch.Generator().manual_seed(1)
    tokens = sum(height * width for height, width in images)
    mask = None
    if valid is not None:
        lens = torch.tensor([valid[sample % len(valid)] for sample in range(batch)])
        mask = torch.arange(text) < lens[:, None]
    return {
        "hidden_states": torch.randn(batch, tokens, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=generator),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, *image) for image in images]] * batch,
    }


MODELS = [
    TinyModel(
        "qwen_image",
        "t2i",
        build,
        lambda batch: inputs((13, 11), valid=(13, 6), batch=batch),
        TokenGrid(1, 13, 11, text=13, text_first=True),
        text_lens=(13, 6),
    ),
    TinyModel(
        "qwen_image",
        "edit",
        build,
        lambda batch: inputs((7, 9), (7, 9), (7, 9), (3, 4), batch=batch),
        TokenGrid(3, 7, 9, text=13, text_first=True, conditioning=12),
    ),
]
