"""Helios in small."""

import functools

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid

HISTORY = 2 * 2 * 3 + 2 * 4 * 5 + 7 * 9  # of 5, 3 and 1 latent frames


def build(**config):
    """Of 2 blocks; the class's context-parallel plan names 40.

    Without a noise level of the history, whose products of one row differ in the last bit by the weights' alignment.
    """
    from diffusers import HeliosTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    sizes |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_dim": (4, 4, 4)}
    sizes |= {"zero_history_timestep": False}
    transformer = seeded(HeliosTransformer3DModel, **(sizes | config))
    parts = {f"blocks.{block}.{part}" for block in ("*", 0, 1) for part in ("attn1", "attn2", "ffn")}
    transformer._cp_plan = {path: share for path, share in transformer._cp_plan.items() if path in parts}
    return transformer


def inputs(batch=2):
    noise = numbers()
    frames = torch.arange(14).expand(batch, -1).split((5, 3, 1, 5), 1)
    call = {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, 7, 16),
        "indices_hidden_states": frames[3],
    }
    for name, places in zip(("long", "mid", "short"), frames, strict=False):
        call[f"latents_history_{name}"] = noise(batch, 4, places.shape[1], 14, 18)
        call[f"indices_latents_history_{name}"] = places
    return call


AMPLIFIED = {"is_amplify_history": True, "zero_history_timestep": True}
GRID = TokenGrid(5, 7, 9, text=HISTORY, text_first=True)
MODELS = [
    TinyModel("helios", "t2v", build, inputs, GRID),
    TinyModel("helios", "amplified", functools.partial(build, **AMPLIFIED), inputs, GRID),
]
