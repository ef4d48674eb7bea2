"""FLUX.1 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """FLUX of 2 dual and 2 single blocks."""
    from diffusers import FluxTransformer2DModel

    sizes = {"in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 12}
    return seeded(FluxTransformer2DModel, **(sizes | {"axes_dims_rope": (4, 6, 6)} | config))


def inputs(*images, text=13, batch=2, timestep=0.5, dtype=torch.float32):
    """Packed images of these (height, width), the made one first."""
    generator = torch.Generator().manual_seed(1)
    ids = [
        torch.cat(
            (torch.full((height * width, 1), index), torch.cartesian_prod(*map(torch.arange, (height, width)))), 1
        )
        for index, (height, width) in enumerate(images)
    ]
    ids = torch.cat(ids).to(dtype)
    return {
        "hidden_states": torch.randn(batch, len(ids), 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=generator),
        "pooled_projections": torch.randn(batch, 12, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


MODELS = [
    TinyModel(
        "flux",
        "t2i",
        build,
        lambda batch: inputs((13, 11), batch=batch),
        TokenGrid(1, 13, 11, text=13, text_first=True),
    ),
    TinyModel(
        "flux",
        "kontext",
        build,
        lambda batch: inputs((7, 9), (7, 9), (7, 9), (2, 5), batch=batch),
        TokenGrid(3, 7, 9, text=13, text_first=True, reference=10),
    ),
]
