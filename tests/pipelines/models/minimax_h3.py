"""MiniMax-H3 in small, with the layouts that Diffusers' own modular pipeline makes."""

import torch
from tiny_models import TinyModel, numbers, seeded

from dit_accel.tokens import TokenGrid

TEXT, SOUND = 7, 6  # sound tokens of each of the two channels
LAYOUT = {"patch_size": (1, 2, 2), "audio_channels": 2, "audio_tag": 2, "video_tag": 0}
LATENT = (5, 14, 18)
CHANNELS, SOUND_CHANNELS = 4, 6


def build(**config):
    from diffusers import MiniMaxH3Transformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2, "ffn_dim": 32}
    sizes |= {"num_refiner_layers": 1, "in_channels": CHANNELS, "audio_in_channels": SOUND_CHANNELS, "text_dim": 16}
    sizes |= {"freq_dim": 16, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2}
    return seeded(MiniMaxH3Transformer3DModel, **(sizes | config))


def layout(keyframes=(), latent=LATENT):
    """Of text to video, or of keyframes to video, whose latent has that many frames, rows and columns."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    tags = torch.ones(TEXT, dtype=torch.long)
    return MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        tags, *latent, num_audio_latents=SOUND, keyframe_anchors=keyframes, **LAYOUT
    )


def reference_layout():
    """Of a picture of another size, a video with sound and a sound on its own."""
    from types import SimpleNamespace

    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3Ref2VAPrepareLayoutStep

    kinds = [("image", False), ("video", True), ("audio", True)]
    latents = [torch.zeros(1, CHANNELS, 1, 6, 10), torch.zeros(1, CHANNELS, 2, 14, 18)]
    return MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(TEXT, dtype=torch.long),
        [SimpleNamespace(kind=kind, has_audio=sound) for kind, sound in kinds],
        latents,
        [torch.zeros(2 * length, SOUND_CHANNELS) for length in (3, 4)],
        *LATENT,
        num_audio_latents=SOUND,
        **LAYOUT,
    )


def inputs(parts, batch=2):
    """A call of that layout, with noise levels of the video, the sound and the conditions."""
    places, tags, video, sound, text, conditions, _ = parts
    noise, levels = numbers(), torch.zeros(len(tags), dtype=torch.long)
    levels[sound], levels[video[:conditions]] = 1, 2
    return {
        "hidden_states": noise(batch, len(video), 4 * CHANNELS),
        "audio_hidden_states": noise(batch, len(sound), SOUND_CHANNELS),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "timestep": torch.tensor([0.4, 0.6, 0.999]),
        "timestep_indices": levels,
        "token_tags": tags,
        "position_ids": places,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
    }


BEFORE = TEXT + 2 * SOUND
REFERENCES = 3 * 5 + (2 * 3 + 2 * 7 * 9) + 2 * 4
MODELS = [
    TinyModel(
        "minimax_h3",
        "t2va",
        build,
        lambda batch: inputs(layout(), batch),
        TokenGrid(5, 7, 9, text=BEFORE, text_first=True),
    ),
    TinyModel(
        "minimax_h3",
        "fl2va",
        build,
        lambda batch: inputs(layout(("first", "last")), batch),
        TokenGrid(5, 7, 9, text=BEFORE + 2 * 63, text_first=True),
    ),
    TinyModel(
        "minimax_h3",
        "ref2va",
        build,
        lambda batch: inputs(reference_layout(), batch),
        TokenGrid(5, 7, 9, text=BEFORE + REFERENCES, text_first=True),
    ),
]
