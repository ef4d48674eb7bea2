"""FLUX.3: the first blocks attend within the text, the image and the conditioning images; joint single blocks follow.

Joint sequences are [text | image | conditioning]. Among the first blocks only the image's are accelerated.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import conditioning_notes, packed_images
from dit_accel.pipelines.sizes import packed_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed image [B, N, C] with ids [N, 4], text [B, T, C], and conditioning tokens [B, R, C] or None."""
    found = packed_images(call)
    if found.grid.conditioning:
        raise DitAccelError(
            f"{call.owner} needs img_ids of one image, or of several of one size; got {found.grid}. Put conditioning "
            "images into image_cond_hidden_states."
        )
    if call.get("image_cond_hidden_states") is None:
        return found
    conditioning = call.length("image_cond_hidden_states")
    return CallLayout(
        dataclasses.replace(found.grid, conditioning=conditioning), notes=conditioning_notes(conditioning)
    )


FAMILY = Family(
    name="flux3",
    transformers=("Flux3Transformer2DModel",),
    attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
    visual_attention=("mode_blocks.*.*.attn",),
    layout=layout,
    sizes=packed_sizes(text=512),
    summary="FLUX.3",
    timestep_scale=1000.0,
)
