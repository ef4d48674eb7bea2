"""Z-Image in small."""

import torch
from tiny_models import TinyModel, seeded

from dit_accel.tokens import TokenGrid


def build(**config):
    """Z-Image of 2 layers and 1 refiner layer of each kind."""
    from diffusers import ZImageTransformer2DModel

    sizes = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    sizes |= {"cap_feat_dim": 20, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]}
    return seeded(ZImageTransformer2DModel, **(sizes | config))


def inputs(height=26, width=22, captions=(20, 40), batch=2):
    """Latents in patches of 2 x 2, with captions of these lengths in turn."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": [torch.randn(4, 1, height, width, generator=generator) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [torch.randn(captions[i % len(captions)], 20, generator=generator) for i in range(batch)],
    }


MODELS = [
    TinyModel(
        "z_image",
        "t2i",
        build,
        lambda batch: inputs(batch=batch),
        # 143 tokens of image are padded to 160, and captions of 20 and 40 to 32 and 64.
        TokenGrid(1, 13, 11, text=64, conditioning=17),
        text_lens=(32, 64),
        compiles="blocks",
        lengths=(224, 224),
    ),
]
