"""FLUX.2, FLUX.3, Krea 2 and Ideogram 4: text precedes packed images, whose places the call tells."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.anchors import in_packed
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import conditioning_notes, image_grids, mask_text, packed_images
from dit_accel.pipelines.sizes import image_sizes, packed_sizes, vae_pixels
from dit_accel.tokens import TokenGrid

PADDING, IMAGE = 0, 2  # values of Ideogram's `indicator`; text is 3


def flux2(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed images [B, N, C], text [B, T, C] and image ids [B, N, 4] or [N, 4]: time, row, column, layer."""
    if call.get("kv_cache_mode") is not None:
        raise DitAccelError(
            f"FLUX.2 has kv_cache_mode={call.get('kv_cache_mode')!r}, which takes keys from a cache. Sparse "
            "attention needs the whole sequence: use Flux2KleinPipeline in place of Flux2KleinKVPipeline, or leave "
            "the model dense."
        )
    return packed_images(call)


def flux3(transformer: nn.Module, call: ModelCall) -> CallLayout:
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


def ideogram4(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Roles (`indicator`) and samples (`segment_ids`) [B, tokens], places [B, tokens, 3]."""
    indicator = call.tensor("indicator", 2)
    roles, samples = (call.once(each, torch.Tensor.clone) for each in (indicator, call.tensor("segment_ids", 2)))
    places = call.once(call.tensor("position_ids", 3), torch.Tensor.clone)
    text = int((roles[0] != IMAGE).sum())
    ordered = torch.equal(roles == IMAGE, (torch.arange(roles.shape[1]) >= text).expand_as(roles))
    if not ordered or not torch.equal(roles != PADDING, samples == samples[:, -1:]):
        raise DitAccelError(
            f"{call.owner} needs sequences that hold one sample each, [padding | text | image] of the same lengths, by "
            "indicator and segment_ids. Pass what the pipeline makes, or run it dense."
        )
    frames, height, width, conditioning = image_grids(places[0, text:])
    grid = TokenGrid(frames, height, width, text=text, text_first=True, conditioning=conditioning)
    return mask_text(call, grid, indicator, conditioning_notes(conditioning))


def krea2(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed image [B, N, C], text [B, T, layers, C] with its mask [B, T] or None, positions [T + N, 3]."""
    images = call.length("hidden_states")
    text = call.length("encoder_hidden_states", 4)
    positions = call.once(call.tensor("position_ids", 2), torch.Tensor.clone)
    if len(positions) != text + images:
        raise DitAccelError(
            f"{call.owner} needs position_ids for {text} text and {images} image tokens, got {len(positions)}."
        )
    frames, height, width, conditioning = image_grids(positions[text:])
    grid = TokenGrid(frames, height, width, text=text, text_first=True, conditioning=conditioning)
    return mask_text(call, grid, call.get("encoder_attention_mask"))


FAMILIES = (
    # Conditioning images follow the generated one. The key-value cache of Klein KV puts conditioning images first and
    # lets them see only themselves; such calls are refused.
    Family(
        name="flux2",
        transformers=("Flux2Transformer2DModel",),
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        layout=flux2,
        sizes=packed_sizes(text=512),
        summary="FLUX.2: dev, Klein (without its key-value cache)",
        timestep_scale=1000.0,
        extend=in_packed,
    ),
    # The first blocks attend within the text, the image and the conditioning images; joint single blocks follow, over
    # [text | image | conditioning]. Among the first blocks only the image's are accelerated.
    Family(
        name="flux3",
        transformers=("Flux3Transformer2DModel",),
        attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
        visual_attention=("mode_blocks.*.*.attn",),
        layout=flux3,
        sizes=packed_sizes(text=512),
        summary="FLUX.3",
        timestep_scale=1000.0,
    ),
    # Padding, text and image are one sequence; guidance comes from a second transformer, without text. Padding attends
    # to itself alone, and nothing reads its output. The model makes its N x N mask in sparse calls too,
    # which do not read it.
    Family(
        name="ideogram4",
        transformers=("Ideogram4Transformer2DModel",),
        attention=("layers.*.attention",),
        layout=ideogram4,
        # 2 x 2 latents a token; the pipeline pads every prompt to 2,048 tokens
        sizes=lambda transformer, vae: image_sizes(2 * vae_pixels(vae), side=2048, text=2048, text_first=True),
        summary="Ideogram 4",
        timestep_scale=1000.0,
        timestep_rises=True,
    ),
    # Padded text is masked.
    Family(
        name="krea2",
        transformers=("Krea2Transformer2DModel",),
        attention=("transformer_blocks.*.attn",),
        layout=krea2,
        sizes=packed_sizes(text=512),
        summary="Krea 2",
        timestep_scale=1000.0,
    ),
)
