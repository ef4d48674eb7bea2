"""Hunyuan-DiT in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build(**config):
    from diffusers import HunyuanDiT2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 26}
    sizes |= {"hidden_size": 16, "num_layers": 4, "cross_attention_dim": 16, "cross_attention_dim_t5": 16}
    sizes |= {"pooled_projection_dim": 8, "text_len": 5, "text_len_t5": 8, "use_style_cond_and_image_meta_size": False}
    return seeded(HunyuanDiT2DModel, **(sizes | config))


def inputs(batch=2):
    """A latent in patches of 2 x 2, with rotary tables of every token."""
    noise = numbers()
    angles = noise(13 * 11, 4).repeat_interleave(2, -1)
    return {
        "hidden_states": noise(batch, 4, 26, 22),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, 5, 16),
        "text_embedding_mask": text_mask((5, 3), 5, batch),
        "encoder_hidden_states_t5": noise(batch, 8, 16),
        "text_embedding_mask_t5": text_mask((8, 4), 8, batch),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


MODELS = [TinyModel("hunyuan_dit", "t2i", build, inputs, TokenGrid(1, 13, 11))]
