"""HiDream in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """HiDream of 1 double and 2 single blocks; all experts are active, so that rounding changes none."""
    from diffusers import HiDreamImageTransformer2DModel

    sizes = {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "caption_channels": [20, 24], "text_emb_dim": 12, "llama_layers": [0, 1, 1]}
    sizes |= {"num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6)}
    return seeded(HiDreamImageTransformer2DModel, **(sizes | {"max_resolution": (26, 26)} | config))


def inputs(height, width, batch=2):
    """A latent in patches of 2 x 2, 5 tokens of T5 and 4 of Llama."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "timesteps": torch.full((batch,), 500.0),
        "encoder_hidden_states_t5": torch.randn(batch, 5, 20, generator=generator),
        "encoder_hidden_states_llama3": torch.randn(2, batch, 4, 24, generator=generator),
        "pooled_embeds": torch.randn(batch, 12, generator=generator),
    }


MODELS = [
    TinyModel(
        "hidream", "square", build, lambda batch: inputs(22, 22, batch), TokenGrid(1, 11, 11, text=13), compiles="no"
    ),
    # An image that is not square is padded to the 13 x 13 tokens of the largest one.
    TinyModel(
        "hidream", "wide", build, lambda batch: inputs(18, 26, batch), TokenGrid(1, 9, 13, text=13, conditioning=52)
    ),
]
