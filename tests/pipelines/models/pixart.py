"""PixArt in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """PixArt of 2 blocks."""
    from diffusers import PixArtTransformer2DModel

    sizes = {"sample_size": 32, "num_layers": 2, "attention_head_dim": 18, "num_attention_heads": 2}
    sizes |= {"cross_attention_dim": 36, "caption_channels": 20, "norm_num_groups": 2}
    return seeded(PixArtTransformer2DModel, **(sizes | config))


def inputs(height=26, width=22, batch=2):
    """A latent in patches of 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 13, 20, generator=generator),
        "encoder_attention_mask": torch.arange(13).expand(batch, -1) < 9,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


MODELS = [TinyModel("pixart", "t2i", build, lambda batch: inputs(batch=batch), TokenGrid(1, 13, 11))]
