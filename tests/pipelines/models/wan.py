"""Wan's family in small."""

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
SIZES |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64}
GRID = TokenGrid(5, 7, 9)


def build(layers=2, **config):
    """Wan of 24 channels."""
    from diffusers import WanTransformer3DModel

    return seeded(WanTransformer3DModel, **(SIZES | {"num_layers": layers} | config))


def build_vace():
    from diffusers import WanVACETransformer3DModel

    return seeded(WanVACETransformer3DModel, **SIZES, vace_layers=[0], vace_in_channels=6)


def build_animate():
    from diffusers import WanAnimateTransformer3DModel

    face = {"motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16}
    face |= {"motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16}
    face |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2, "image_dim": 4}
    return seeded(WanAnimateTransformer3DModel, **(SIZES | {"in_channels": 12, "latent_channels": 4} | face))


def build_chronoedit(layers=2):
    from diffusers import ChronoEditTransformer3DModel

    return seeded(ChronoEditTransformer3DModel, **(SIZES | {"num_layers": layers}))


def inputs(frames=5, height=14, width=18, batch=2, timestep=500, channels=4):
    """Latents of `frames` x `height` x `width`, in patches of 1 x 2 x 2."""
    noise = numbers()
    return {
        "hidden_states": noise(batch, channels, frames, height, width),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": noise(batch, 7, 16),
    }


def vace_inputs(batch):
    return inputs(batch=batch) | {"control_hidden_states": numbers(2)(batch, 6, 5, 14, 18)}


def animate_inputs(batch):
    """The first frame is the reference image; 13 face images make 4 face vectors, one for each other frame."""
    noise = numbers(2)
    return inputs(batch=batch, channels=12) | {
        "encoder_hidden_states_image": noise(batch, 3, 4),
        "pose_hidden_states": noise(batch, 4, 4, 14, 18),
        "face_pixel_values": noise(batch, 3, 13, 16, 16),
    }


MODELS = [
    TinyModel("wan", "t2v", build, lambda batch: inputs(batch=batch), GRID),
    TinyModel("wan", "vace", build_vace, vace_inputs, GRID),
    TinyModel("wan", "animate", build_animate, animate_inputs, GRID),
    TinyModel("wan", "chronoedit", build_chronoedit, lambda batch: inputs(batch=batch), GRID),
]
