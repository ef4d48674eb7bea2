"""Z-Image: base and Turbo.

A sample is [image | padding | caption | padding]. Image and caption are each padded to a multiple of 32 with learned
tokens, which are attended. The image's padding counts as conditioning tokens, the caption's as text. Padding to the
batch's longest sample follows, and is masked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.sizes import Config, Shape, Sizes, image_sizes, vae_pixels
from dit_accel.tokens import TokenGrid

MULTIPLE = 32


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Latents, a list of [C, F, H, W], and captions, a list of [T, C]."""
    images, captions = call.get("x"), call.get("cap_feats")
    if not images or not isinstance(images[0], torch.Tensor):
        raise DitAccelError(
            "Z-Image was called with several images a sample (Omni), where captions and images alternate; sparse "
            "attention takes one image and one caption. Leave the model dense."
        )
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        raise DitAccelError(
            f"The images of a batch must have one size, got latents of {sorted(sizes)} (frames, height, width); call "
            "the pipeline once for each size."
        )
    patch, frames_patch = (call.get(name) or default for name, default in (("patch_size", 2), ("f_patch_size", 1)))
    visual = patch_grid(sizes.pop(), (frames_patch, patch, patch))
    text = [_padded(len(caption)) for caption in captions]
    conditioning = _padded(visual.visual) - visual.visual
    grid = TokenGrid(*visual.shape, text=max(text), conditioning=conditioning)
    lens: Any = None if min(text) == max(text) else torch.tensor(text, dtype=torch.int32, device=call.device)
    return CallLayout(grid, text_lens=lens)


def _padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""

    def padding(shape: Shape) -> int:
        return _padded(math.prod(shape)) - math.prod(shape)

    longest = min(transformer["axes_lens"][1:])
    return image_sizes(2 * vae_pixels(vae), text=512, longest=longest, conditioning=padding)


FAMILY = Family(
    name="z_image",
    transformers=("ZImageTransformer2DModel",),
    attention=("layers.*.attention",),
    layout=layout,
    sizes=sizes,
    summary="Z-Image: base, Turbo",
    timestep_name="t",
    timestep_scale=1000.0,
    timestep_rises=True,
)
