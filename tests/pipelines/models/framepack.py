"""FramePack in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid

LENGTHS = (11, 4)
IMAGE = 3
HISTORY = 7 * 9 + 2 * 4 * 5 + 2 * 2 * 3  # of 1, 3 and 5 latent frames


def build(**config):
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16}
    sizes |= {"pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4), "mlp_ratio": 2.0, "image_proj_dim": 8}
    sizes |= {"has_image_proj": True, "has_clean_x_embedder": True}
    return seeded(HunyuanVideoFramepackTransformer3DModel, **sizes, **config)


def inputs(batch=2):
    noise = numbers()
    clean, half, quarter = (torch.arange(length) for length in (1, 3, 5))
    return {
        "hidden_states": noise(batch, 4, 5, 14, 18),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, 13, 16),
        "encoder_attention_mask": text_mask(LENGTHS, 13, batch),
        "pooled_projections": noise(batch, 8),
        "image_embeds": noise(batch, IMAGE, 8),
        "indices_latents": torch.arange(9, 14),
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": noise(batch, 4, 1, 14, 18),
        "indices_latents_clean": clean,
        "latents_history_2x": noise(batch, 4, 3, 14, 18),
        "indices_latents_history_2x": 1 + half,
        "latents_history_4x": noise(batch, 4, 5, 14, 18),
        "indices_latents_history_4x": 4 + quarter,
    }


GRID = TokenGrid(5, 7, 9, text=IMAGE + 13, conditioning=HISTORY)
ORDER = torch.arange(GRID.tokens)
ROWS = torch.cat((ORDER[HISTORY : HISTORY + 315], ORDER[:HISTORY], ORDER[HISTORY + 315 :]))
VALID = (IMAGE + LENGTHS[0], IMAGE + LENGTHS[1])
MODELS = [TinyModel("framepack", "i2v", build, inputs, GRID, VALID, rows=ROWS.expand(2, -1))]
