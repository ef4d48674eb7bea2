"""FLUX.2 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """FLUX.2 of 1 dual and 2 parallel single blocks."""
    from diffusers import Flux2Transformer2DModel

    sizes = {"in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "timestep_guidance_channels": 16}
    return seeded(Flux2Transformer2DModel, **(sizes | {"axes_dims_rope": (4, 4, 4, 4)} | config))


def inputs(*images, text=13, batch=2):
    """Packed images of these (height, width), the made one first."""
    generator = torch.Generator().manual_seed(1)
    ids = [
        torch.cartesian_prod(torch.tensor([10 * index]), *map(torch.arange, image), torch.tensor([0]))
        for index, image in enumerate(images)
    ]
    ids = torch.cat(ids).expand(batch, -1, -1)
    text_ids = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, text))).expand(batch, -1, -1)
    return {
        "hidden_states": torch.randn(batch, ids.shape[1], 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.0),
        "img_ids": ids,
        "txt_ids": text_ids,
    }


MODELS = [
    TinyModel(
        "flux2",
        "t2i",
        build,
        lambda batch: inputs((13, 11), batch=batch),
        TokenGrid(1, 13, 11, text=13, text_first=True),
    ),
    TinyModel(
        "flux2",
        "edit",
        build,
        lambda batch: inputs((7, 9), (7, 9), (7, 9), (2, 5), batch=batch),
        TokenGrid(3, 7, 9, text=13, text_first=True, conditioning=10),
    ),
]
