"""Kandinsky 6 in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build(**config):
    """Of 2 visual blocks."""
    from diffusers import Kandinsky6Transformer3DModel

    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 12, "time_dim": 16}
    sizes |= {"model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)}
    return seeded(Kandinsky6Transformer3DModel, **(sizes | {"visual_cond": False, "in_audio_dim": 6} | config))


def inputs(batch=2, frames=5, reference=0):
    """Latents with the channels last, 11 sound tokens, and frames behind the video whose place in time is 0."""
    noise = numbers()
    time = torch.cat((torch.arange(frames), torch.zeros(reference, dtype=torch.long)))
    return {
        "hidden_states": noise(batch, frames + reference, 14, 18, 4),
        "encoder_hidden_states": noise(batch, 7, 20),
        "pooled_projections": noise(batch, 12),
        "timestep": torch.full((batch,), 500.0),
        "audio_hidden_states": noise(batch, 11, 6),
        "visual_rope_pos": (time, torch.arange(7), torch.arange(9)),
        "encoder_attention_mask": text_mask((7, 3), 7, batch).bool()[:, None, None],
    }


# The model computes its norms and rotary tables in float32.
MODELS = [
    TinyModel("kandinsky6", "t2va", build, inputs, TokenGrid(5, 7, 9), coarsest=torch.float32),
    TinyModel(
        "kandinsky6",
        "reference",
        build,
        lambda batch: inputs(batch, reference=1),
        TokenGrid(5, 7, 9, conditioning=63),
        coarsest=torch.float32,
    ),
]
