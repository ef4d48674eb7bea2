"""LTX-Video in small."""

import torch
from tiny_models import TinyModel, numbers, seeded, text_mask

from dit_accel.tokens import TokenGrid


def build(**config):
    from diffusers import LTXVideoTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"cross_attention_dim": 24, "num_layers": 2, "caption_channels": 16}
    return seeded(LTXVideoTransformer3DModel, **(sizes | config))


def inputs(batch=2):
    noise = numbers()
    return {
        "hidden_states": noise(batch, 5 * 7 * 9, 4),
        "encoder_hidden_states": noise(batch, 7, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask((7, 3), 7, batch),
        "num_frames": 5,
        "height": 7,
        "width": 9,
    }


def places(frames, height, width, start=0):
    """Pixel coordinates as the pipelines make them, [3, tokens]: the first frame of eight is alone.

    In integers, so that they are the same in fp32 and fp64: the rounding of positions would hide smaller errors.
    """
    times = (8 * torch.arange(frames) - 7).clamp(min=0) + start
    axes = torch.meshgrid(times, 32 * torch.arange(height), 32 * torch.arange(width), indexing="ij")
    return torch.stack(axes).flatten(1)


def condition_inputs(batch):
    """A keyframe before the video, as `LTXConditionPipeline` packs it, and no sizes."""
    coordinates = torch.cat((places(1, 7, 9, start=16), places(5, 7, 9)), 1)
    without = {"num_frames": None, "height": None, "width": None}
    packed = numbers(2)(batch, 6 * 7 * 9, 4)
    return inputs(batch) | without | {"hidden_states": packed, "video_coords": coordinates.repeat(batch, 1, 1)}


MODELS = [
    TinyModel("ltx", "t2v", build, inputs, TokenGrid(5, 7, 9)),
    TinyModel(
        "ltx",
        "condition",
        build,
        condition_inputs,
        TokenGrid(5, 7, 9, conditioning=63),
        rows=torch.cat((torch.arange(63, 378), torch.arange(63))).repeat(2, 1),
    ),
]
