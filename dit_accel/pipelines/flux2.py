"""FLUX.2: dev and Klein.

Text precedes the images in dual and single blocks; conditioning images follow the generated one. The key-value cache
of Klein KV puts conditioning images first and lets them see only themselves; such calls are refused.
"""

from __future__ import annotations

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.anchors import in_packed
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import packed_images
from dit_accel.pipelines.sizes import packed_sizes


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed images [B, N, C], text [B, T, C] and image ids [B, N, 4] or [N, 4]: time, row, column, layer."""
    if call.get("kv_cache_mode") is not None:
        raise DitAccelError(
            f"FLUX.2 has kv_cache_mode={call.get('kv_cache_mode')!r}, which takes keys from a cache. Sparse "
            "attention needs the whole sequence: use Flux2KleinPipeline in place of Flux2KleinKVPipeline, or leave "
            "the model dense."
        )
    return packed_images(call)


FAMILY = Family(
    name="flux2",
    transformers=("Flux2Transformer2DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=packed_sizes(text=512),
    summary="FLUX.2: dev, Klein (without its key-value cache)",
    timestep_scale=1000.0,
    extend=in_packed,
)
