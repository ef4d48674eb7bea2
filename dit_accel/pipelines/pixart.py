"""PixArt-alpha and PixArt-sigma: self-attention (`attn1`) sees the image alone; text enters through cross-attention."""

from __future__ import annotations

from dit_accel.pipelines.family import CallLayout, Family
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def sizes(transformer: Config, vae: Config) -> Sizes:
    """The default image is `sample_size` latents a side."""
    pixels = vae_pixels(vae)
    return image_sizes(pixels * transformer["patch_size"], transformer["sample_size"] * pixels)


FAMILY = Family(
    name="pixart",
    transformers=("PixArtTransformer2DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=lambda transformer, call: CallLayout(image_of(call, transformer.config.patch_size)),
    sizes=sizes,
    summary="PixArt-alpha, PixArt-sigma",
)
