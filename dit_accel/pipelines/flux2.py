"""FLUX.2: dev and Klein.

Text stands before the images in dual and single blocks; a single block makes q, k, v and its MLP with one projection.
Conditioning images stand behind the made one. The key-value cache of Klein KV puts them in front and lets them see
themselves alone, which is another attention than ours.
"""

from __future__ import annotations

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import packed_images
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed images [B, N, C], text [B, T, C] and image ids [B, N, 4] or [N, 4]: time, row, column, layer."""
    if call.get("kv_cache_mode") is not None:
        raise DitAccelError(
            f"FLUX.2 was called with kv_cache_mode={call.get('kv_cache_mode')!r}, where conditioning tokens see only "
            "themselves and their keys come from a cache; sparse attention needs the whole sequence. Use "
            "Flux2KleinPipeline in place of Flux2KleinKVPipeline, or leave the model dense."
        )
    return packed_images(call)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""
    return image_sizes(2 * vae_pixels(vae), text=512, text_first=True)


FAMILY = Family(
    name="flux2",
    transformers=("Flux2Transformer2DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=sizes,
    summary="FLUX.2: dev, Klein (without its key-value cache)",
    timestep_scale=1000.0,
)
