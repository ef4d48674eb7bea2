"""LTX-2 in small."""

import functools

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build(**config):
    from diffusers import LTX2VideoTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"cross_attention_dim": 24, "audio_in_channels": 4, "audio_out_channels": 4, "num_layers": 2}
    sizes |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    return seeded(LTX2VideoTransformer3DModel, **sizes, caption_channels=16, **config)


def inputs(batch=2):
    """Video and 11 audio tokens."""
    noise = numbers()
    return {
        "hidden_states": noise(batch, 5 * 7 * 9, 4),
        "audio_hidden_states": noise(batch, 11, 4),
        "encoder_hidden_states": noise(batch, 7, 16),
        "audio_encoder_hidden_states": noise(batch, 7, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask((7, 3), 7, batch),
        "audio_encoder_attention_mask": text_mask((7, 3), 7, batch),
        "num_frames": 5,
        "height": 7,
        "width": 9,
        "audio_num_frames": 11,
    }


def keyframe_inputs(batch):
    """A keyframe behind the video, and bounds of all tokens' places, in integers as in `ltx.places`."""
    video = TokenGrid(5, 7, 9).coordinates().T * torch.tensor([[8], [32], [32]])
    keyframe = TokenGrid(1, 7, 9).coordinates().T * torch.tensor([[8], [32], [32]]) + torch.tensor([[33], [0], [0]])
    starts = torch.cat((video, keyframe), 1)
    bounds = torch.stack((starts, starts + 32), -1).expand(batch, -1, -1, -1)
    return inputs(batch) | {"hidden_states": numbers(2)(batch, 6 * 7 * 9, 4), "video_coords": bounds}


build_gated = functools.partial(build, gated_attn=True, audio_gated_attn=True, perturbed_attn=True, rope_type="split")
MODELS = [
    TinyModel("ltx2", "2.0", build, inputs, TokenGrid(5, 7, 9)),
    TinyModel("ltx2", "2.3", build_gated, inputs, TokenGrid(5, 7, 9)),
    TinyModel("ltx2", "keyframe", build, keyframe_inputs, TokenGrid(5, 7, 9, conditioning=63)),
]
