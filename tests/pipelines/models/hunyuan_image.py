"""HunyuanImage 2.1 in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """HunyuanImage of 1 dual and 1 single block."""
    from diffusers import HunyuanImageTransformer2DModel

    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    sizes |= {"num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 20, "rope_axes_dim": (8, 8)}
    return seeded(HunyuanImageTransformer2DModel, **(sizes | config))


def inputs(*sizes, text=13, valid=(13, 6), glyphs=0, batch=2):
    """A latent of these sizes; `valid`: text tokens of the samples in turn, half of the glyph text is valid."""
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor([valid[sample % len(valid)] for sample in range(batch)])
    call = {
        "hidden_states": torch.randn(batch, 4, *sizes, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=generator),
        "encoder_attention_mask": torch.arange(text) < lens[:, None],
    }
    if glyphs:
        call["encoder_hidden_states_2"] = torch.randn(batch, glyphs, 10, generator=generator)
        call["encoder_attention_mask_2"] = (torch.arange(glyphs) < glyphs // 2).expand(batch, -1)
    return call


MODELS = [
    TinyModel(
        "hunyuan_image",
        "refiner",
        lambda: build(patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6)),
        lambda batch: inputs(3, 7, 9, batch=batch),
        TokenGrid(3, 7, 9, text=13),
        text_lens=(13, 6),
    ),
    TinyModel(
        "hunyuan_image",
        "glyphs",
        lambda: build(text_embed_2_dim=10),
        lambda batch: inputs(13, 11, glyphs=6, batch=batch),
        TokenGrid(1, 13, 11, text=19),
        text_lens=(16, 9),
        compiles="no",
    ),
]
