"""Krea 2 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """Krea 2 of 2 blocks, with 2 query heads a key head."""
    from diffusers import Krea2Transformer2DModel

    sizes = {"in_channels": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "timestep_embed_dim": 16, "text_hidden_dim": 20}
    sizes |= {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    sizes |= {"text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    return seeded(Krea2Transformer2DModel, **(sizes | {"axes_dims_rope": (4, 6, 6)} | config))


def inputs(valid=(13, 6), text=13, batch=2):
    """A packed image of 13 x 11; `valid`: text tokens of the samples in turn."""
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor([valid[sample % len(valid)] for sample in range(batch)])
    return {
        "hidden_states": torch.randn(batch, 143, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 2, 20, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": torch.cat((torch.zeros(text, 3), torch.cartesian_prod(*map(torch.arange, (1, 13, 11))))),
        "encoder_attention_mask": torch.arange(text) < lens[:, None],
    }


MODELS = [
    TinyModel(
        "krea2",
        "t2i",
        build,
        lambda batch: inputs(batch=batch),
        TokenGrid(1, 13, 11, text=13, text_first=True),
        text_lens=(13, 6),
    )
]
