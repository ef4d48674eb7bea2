"""CLEAR's FLUX.1-dev: the projections of every attention layer, tuned for a disc around each token of the image.

The files hold no radius: the user names it. The `_down_4` variants add the weights of pooled keys to each layer.

Source: Huage001/CLEAR (attention_processor.py, distill.py), Apache-2.0.
"""

from __future__ import annotations

import re

from dit_accel.checkpoint.model_weights import NewWeight
from dit_accel.checkpoint.published import Format, Tuned, WeightReading
from dit_accel.checkpoint.weight_files import StoredModel, StoredTensor, WeightFiles

LAYER = r"(single_)?transformer_blocks\.\d+\.attn\."
PROJECTION = re.compile(rf"{LAYER}(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")
CELLS = ".attn.processor.spatial_weight"  # [1, 1, 1, pool, 1, pool, 1]
PREFIX = "transformer."  # of some exports


class Clear(Format):
    """CLEAR's FLUX.1-dev: a disc around each token of the image, with pooled keys or without."""

    name = "clear"
    source = "github.com/Huage001/CLEAR"
    transformers = ("FluxTransformer2DModel",)

    def detect(self, files: WeightFiles) -> bool:
        """Nothing but these projections, in both kinds of blocks."""
        names = [name.removeprefix(PREFIX) for model in files.models.values() for name in model.tensors]
        stacks = {name.partition(".")[0] for name in names}
        known = all(PROJECTION.fullmatch(name) or name.endswith(CELLS) for name in names)
        return known and stacks == {"single_transformer_blocks", "transformer_blocks"}

    def tuned(self, files: WeightFiles) -> Tuned:
        cells = files.first.shape(CELLS)
        pool = cells[3] if cells is not None and len(cells) == 7 else 0
        config = {"pool": pool} if cells is not None else {}
        return Tuned("clear", config, ask={"radius": "8, 16 or 32, as its name says"})

    def read(self, model: StoredModel) -> WeightReading:
        tensors = {name.removeprefix(PREFIX): stored for name, stored in model.tensors.items()}
        weights = {name: NewWeight.of(stored) for name, stored in tensors.items() if not name.endswith(CELLS)}
        learned = {
            name.replace(CELLS, ".attn.cell_weights.weight"): _squeezed(stored)
            for name, stored in tensors.items()
            if name.endswith(CELLS)
        }
        return WeightReading(weights, learned, lambda name: PROJECTION.fullmatch(name) is not None)


def _squeezed(stored: StoredTensor) -> NewWeight:
    """[1, 1, 1, pool, 1, pool, 1] as [pool, pool]; any other shape stays, and fits nowhere."""
    shape = stored.shape
    if len(shape) == 7 and shape == (1, 1, 1, shape[3], 1, shape[5], 1):
        shape = shape[3], shape[5]
    return NewWeight((stored.key,), shape, lambda old: stored.read().reshape(shape))


FORMAT = Clear()
