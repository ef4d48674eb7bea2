"""AnyFlow in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """AnyFlow of 2 blocks."""
    from diffusers import AnyFlowTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    sizes |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64}
    return seeded(AnyFlowTransformer3DModel, **(sizes | config))


def inputs(frames=5, height=14, width=18, batch=2):
    """Latents frame by frame, in patches of 1 x 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, frames, 4, height, width, generator=generator),
        "timestep": torch.full((batch, frames), 500.0),
        "r_timestep": torch.full((batch, frames), 400.0),
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=generator),
    }


MODELS = [TinyModel("anyflow", "t2v", build, lambda batch: inputs(batch=batch), TokenGrid(5, 7, 9))]
