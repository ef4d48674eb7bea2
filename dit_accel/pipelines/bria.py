"""Bria 3.2: blocks, text and image ids as in FLUX.1, but the timestep in the scheduler's own units."""

from __future__ import annotations

from dit_accel.pipelines import flux
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""
    return image_sizes(2 * vae_pixels(vae), text=128, text_first=True)


FAMILY = Family(
    name="bria",
    transformers=("BriaTransformer2DModel",),
    attention=flux.FAMILY.attention,
    layout=flux.layout,
    sizes=sizes,
    summary="Bria 3.2",
)
