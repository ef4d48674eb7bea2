"""FLUX.1: dev, schnell, Fill, Control and Kontext.

Text stands before the image, in dual blocks and single blocks alike, and its padding is attended, as the model was
trained. Single blocks get the joined sequence without a word on where the text ends, and the image is packed, so the
root call is the only place that knows both: text from `encoder_hidden_states`, rows and columns from `img_ids`.
"""

from __future__ import annotations

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import Call, Family, Layout, Preset, image_grids
from dit_accel.tokens import TokenGrid


def layout(transformer: nn.Module, call: Call) -> Layout:
    """Packed image [B, N, C], text [B, T, C] and image ids [N, 3], or [B, N, 3] as older code passes them.

    A conditioning image of the same size (Kontext) is a further frame; others attend to everything and the reverse.
    """
    image = call.tensor("hidden_states", 3)
    text = call.tensor("encoder_hidden_states", 3)
    ids = call.get("img_ids")
    if not isinstance(ids, torch.Tensor) or ids.shape[-2] != image.shape[1]:
        came = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise DitAccelError(f"FLUX needs img_ids for each of the {image.shape[1]} image tokens, got {came}.")
    frames, height, width, reference = call.once(ids, _read_ids)
    grid = TokenGrid(frames, height, width, text=text.shape[1], text_first=True, reference=reference)
    notes = (f"{reference} tokens of conditioning images of another size are dense both ways",) if reference else ()
    return Layout(grid, notes=notes)


def _read_ids(ids: torch.Tensor) -> tuple[int, int, int, int]:
    return image_grids(ids if ids.ndim == 2 else ids[0])


RECOMMENDED = {
    "gna": Preset(
        config={"window": ("full", 80, 80), "stride": (1, 16, 16)},
        schedule={"dense_steps": 9},
        source="GNA (arXiv:2504.16922): FLUX.1-dev at 4096x4096, 28 steps",
    ),
}

FAMILY = Family(
    name="flux",
    transformers=("FluxTransformer2DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    summary="FLUX.1: dev, schnell, Fill, Control, Kontext",
    timestep_scale=1000.0,
    recommended=RECOMMENDED,
)
