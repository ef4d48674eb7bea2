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


def chroma(**config):
    """Chroma of 2 dual and 2 single blocks."""
    from diffusers import ChromaTransformer2DModel

    sizes = {"in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6)}
    sizes |= {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return seeded(ChromaTransformer2DModel, **(sizes | config))


def longcat(**config):
    """LongCat-Image of 1 dual and 2 single blocks."""
    from diffusers import LongCatImageTransformer2DModel

    sizes = {"in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 20}
    return seeded(LongCatImageTransformer2DModel, **(sizes | {"axes_dims_rope": (4, 6, 6)} | config))


def ovis(**config):
    """Ovis-Image of 1 dual and 2 single blocks."""
    from diffusers import OvisImageTransformer2DModel

    sizes = {"in_channels": 8, "out_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6)}
    return seeded(OvisImageTransformer2DModel, **(sizes | config))


def masked(valid=(13, 6), batch=2):
    """A call of Chroma, with a mask over text and image; `valid`: text tokens of the samples in turn."""
    call = unpooled(batch)
    lens = torch.tensor([valid[sample % len(valid)] for sample in range(batch)])
    tokens = torch.arange(13 + 13 * 11)
    return call | {"attention_mask": (tokens < lens[:, None]) | (tokens >= 13)}


def added(valid=(13, 6), batch=2):
    """A call of Chroma as its pipelines make it: with a mask of ones and zeros that is added to the logits."""
    call = masked(valid, batch)
    return call | {"attention_mask": call["attention_mask"].float()}


def unpooled(batch=2):
    """A call of a model without pooled text."""
    call = inputs((13, 11), batch=batch)
    del call["pooled_projections"]
    return call


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


GRID = TokenGrid(1, 13, 11, text=13, text_first=True)
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
        TokenGrid(3, 7, 9, text=13, text_first=True, conditioning=10),
    ),
    TinyModel("flux", "chroma", chroma, lambda batch: masked(batch=batch), GRID, text_lens=(13, 6)),
    TinyModel("flux", "chroma-stock", chroma, lambda batch: added(batch=batch), GRID, text_lens=(13, 6)),
    TinyModel("flux", "longcat", longcat, unpooled, GRID),
    TinyModel("flux", "ovis", ovis, unpooled, GRID),
]
