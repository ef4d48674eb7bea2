"""FLUX.3 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """FLUX.3 of 1 block for each kind of token and 2 joint blocks."""
    from diffusers import Flux3Transformer2DModel

    sizes = {"in_channels": 8, "cond_in_channels": 6, "num_layers": 1, "num_single_layers": 2}
    sizes |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 20, "timestep_channels": 16}
    return seeded(Flux3Transformer2DModel, **(sizes | {"axes_dims_rope": (4, 4, 4, 4)} | config))


def inputs(conditioning=(), text=13, batch=2):
    """A packed image of 13 x 11, and conditioning tokens of another size."""
    generator = torch.Generator().manual_seed(1)
    call = {
        "hidden_states": torch.randn(batch, 143, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 13, 11, 1))),
        "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, text))),
    }
    if conditioning:
        ids = torch.cartesian_prod(torch.tensor([10]), *map(torch.arange, conditioning), torch.tensor([0]))
        tokens = torch.randn(batch, len(ids), 6, generator=generator)
        call |= {"image_cond_ids": ids, "image_cond_hidden_states": tokens}
    return call


MODELS = [
    TinyModel("flux3", "t2i", build, lambda batch: inputs(batch=batch), TokenGrid(1, 13, 11, text=13, text_first=True)),
    TinyModel(
        "flux3",
        "edit",
        build,
        lambda batch: inputs((2, 5), batch=batch),
        TokenGrid(1, 13, 11, text=13, text_first=True, conditioning=10),
        lengths=(143, 166),
    ),
]
