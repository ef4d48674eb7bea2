"""Ideogram 4 in small, of which the image's tokens are read, as its pipeline does."""

import functools

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid

TEXT, LENGTHS = 13, (13, 6)


def build(**config):
    """Of 2 blocks."""
    from diffusers import Ideogram4Transformer2DModel

    class ImageAlone(Ideogram4Transformer2DModel):
        @functools.wraps(Ideogram4Transformer2DModel.forward)
        def forward(self, *args, **kwargs):
            (output,) = super().forward(*args, **kwargs)
            return (output[:, -143:],)

    sizes = {"in_channels": 8, "num_layers": 2, "attention_head_dim": 24, "num_attention_heads": 2, "adaln_dim": 16}
    sizes |= {"intermediate_size": 32, "llm_features_dim": 20, "mrope_section": (4, 4, 4)}
    return seeded(ImageAlone, **(sizes | config))


def inputs(batch=2, text=TEXT):
    """A packed image of 13 x 11 behind texts of different length, padded on the left; without text as for guidance."""
    from diffusers import Ideogram4Pipeline

    lengths = [min(LENGTHS[sample % 2], text) for sample in range(batch)]
    places, samples, roles = Ideogram4Pipeline._prepare_ids(lengths, 13, 11, text, torch.device("cpu"))
    noise = numbers()
    return {
        "hidden_states": noise(batch, text + 143, 8),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": noise(batch, text + 143, 20),
        "position_ids": places,
        "segment_ids": samples,
        "indicator": roles,
    }


def rows():
    """The valid text before the padding."""
    order = torch.arange(TEXT + 143)
    padding = TEXT - LENGTHS[1]
    return torch.stack((order, torch.cat((order[padding:TEXT], order[:padding], order[TEXT:]))))


GRID = TokenGrid(1, 13, 11, text=TEXT, text_first=True)
MODELS = [TinyModel("ideogram4", "t2i", build, inputs, GRID, text_lens=LENGTHS, rows=rows())]
