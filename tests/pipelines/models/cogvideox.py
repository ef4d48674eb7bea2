"""CogVideoX's family in small."""

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
SIZES |= {"time_embed_dim": 8, "text_embed_dim": 16, "max_text_seq_length": 13}
SIZES |= {"sample_width": 18, "sample_height": 14, "sample_frames": 17}
GRID = TokenGrid(5, 7, 9, text=13, text_first=True)


def build():
    """As CogVideoX-2B, with positions added to the tokens."""
    from diffusers import CogVideoXTransformer3DModel

    return seeded(CogVideoXTransformer3DModel, **SIZES)


def build_15():
    """As CogVideoX-1.5-5B-I2V: patches along time, rotary positions, an offset embedding."""
    from diffusers import CogVideoXTransformer3DModel

    newer = {"patch_size_t": 2, "ofs_embed_dim": 8, "use_rotary_positional_embeddings": True, "patch_bias": False}
    return seeded(CogVideoXTransformer3DModel, **SIZES, **newer)


def build_consisid():
    from diffusers import ConsisIDTransformer3DModel

    face = {"is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 1}
    face |= {"LFE_id_dim": 6, "LFE_vit_dim": 6, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2}
    face |= {"LFE_num_id_token": 1, "LFE_num_querie": 3, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 5}
    return seeded(ConsisIDTransformer3DModel, **SIZES, **face, use_rotary_positional_embeddings=True)


def inputs(batch=2, frames=5):
    noise = numbers()
    return {
        "hidden_states": noise(batch, frames, 4, 14, 18),
        "encoder_hidden_states": noise(batch, 13, 16),
        "timestep": torch.full((batch,), 500),
    }


def rotary():
    angles = numbers(3)(GRID.visual, 8).repeat_interleave(2, 1)
    return {"image_rotary_emb": (angles.cos(), angles.sin())}


def inputs_15(batch):
    return inputs(batch, frames=10) | rotary() | {"ofs": torch.full((1,), 2.0)}


def consisid_inputs(batch):
    noise = numbers(2)
    face = {"id_cond": noise(batch, 6), "id_vit_hidden": [noise(batch, 4, 6) for _ in range(5)]}
    return inputs(batch) | rotary() | face


MODELS = [
    TinyModel("cogvideox", "1.0", build, inputs, GRID),
    TinyModel("cogvideox", "1.5", build_15, inputs_15, GRID),
    TinyModel("cogvideox", "consisid", build_consisid, consisid_inputs, GRID),
]
