"""Kandinsky 5 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """Kandinsky 5 of 2 visual blocks."""
    from diffusers import Kandinsky5Transformer3DModel

    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 12, "time_dim": 16}
    sizes |= {"model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)}
    return seeded(Kandinsky5Transformer3DModel, **(sizes | config))


def inputs(frames=5, height=14, width=18, batch=2):
    """Latents with the channels last, in patches of 1 x 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, frames, height, width, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 20, generator=generator),
        "pooled_projections": torch.randn(batch, 12, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "visual_rope_pos": tuple(map(torch.arange, (frames, height // 2, width // 2))),
        "text_rope_pos": torch.arange(7),
    }


# The model rounds rotated queries and keys to bfloat16.
MODELS = [
    TinyModel(
        "kandinsky5", "t2v", build, lambda batch: inputs(batch=batch), TokenGrid(5, 7, 9), coarsest=torch.bfloat16
    )
]
