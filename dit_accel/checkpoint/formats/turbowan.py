"""TurboDiffusion's Wan: sparse-linear attention and rCM in up to 4 steps.

Every weight differs from Wan's, so the files hold whole transformers. SLA's projection stands under three names; int8
copies hold a scale for each tile of 128 x 128.

Sources: thu-ml/TurboDiffusion (turbodiffusion/SLA/core.py, inference/modify_model.py, ops/core.py);
IPostYellow/TurboWan_to_Diffusers; hao-ai-lab/FastVideo (scripts/checkpoint_conversion). All Apache-2.0.
"""

from __future__ import annotations

import torch

from dit_accel.checkpoint import wan_names
from dit_accel.checkpoint.few_steps import rcm
from dit_accel.checkpoint.model_weights import NewWeight, every
from dit_accel.checkpoint.published import Format, Tuned, WeightReading
from dit_accel.checkpoint.weight_files import StoredModel, StoredTensor, WeightFiles

PROJECTIONS = (".attn1.attn_op.local_attn.proj_l.", ".attn1.attn_impl.proj_l.")  # the first in the original's too
SCALES = {".int8_weight": ".scale", ".weight": ".weight_scale_inv"}  # quantised tensors and their scales
TILE = 128  # of a scale
PATCH = 4  # values of a channel in a patch of 1 x 2 x 2


class TurboWan(Format):
    """TurboDiffusion's Wan 2.1 and 2.2: sparse-linear attention, up to 4 steps, int8 or not."""

    name = "turbowan"
    source = "github.com/thu-ml/TurboDiffusion"
    transformers = ("WanTransformer3DModel",)

    def detect(self, files: WeightFiles) -> bool:
        return files.all_have(r"(net\.)?blocks\.0\..*\.proj_l\.weight")

    def tuned(self, files: WeightFiles) -> Tuned:
        """From an image the first level is another, and no fresh noise is drawn; A14B's models meet at 0.9."""
        first = files.first
        inputs = first.shape("patch_embedding.weight") or first.shape("patch_embedding.proj.weight")
        outputs = first.shape("head.head.bias") or first.shape("proj_out.bias")
        values = PATCH if inputs is not None and len(inputs) == 2 else 1  # of a channel, where the patch is flat
        from_image = inputs is not None and outputs is not None and inputs[1] // values > outputs[0] // PATCH
        sampler = rcm(200 if from_image else 80, ode=from_image, boundary_ratio=0.9 if len(files.models) > 1 else None)
        call = {"num_inference_steps": len(sampler.sigmas), "guidance_scale": 1.0}
        topk = first.config.get("sla_topk", 0.1)
        return Tuned("sla", {"topk": topk, "block_q": 128, "block": 64}, call, sampler)

    def read(self, model: StoredModel) -> WeightReading:
        tensors, notes = wan_names.in_diffusers(model.tensors)
        weights, learned = {}, {}
        for name, new in _dequantised(tensors).items():
            spelling = next((part for part in PROJECTIONS if part in name), None)
            if spelling is None:
                weights[name] = wan_names.unflattened(name, new)
            else:
                learned[name.replace(spelling, ".attn1.sparse_linear.proj.")] = new
        return WeightReading(weights, learned, every, notes)


def _dequantised(tensors: dict[str, StoredTensor]) -> dict[str, NewWeight]:
    """The tensors, each int8 one times its scale."""
    weights = {}
    for name, stored in tensors.items():
        stem, _, ending = name.rpartition(".")
        scale = tensors.get(stem + SCALES.get(f".{ending}", "")) if f".{ending}" in SCALES else None
        if scale is not None:
            weights[f"{stem}.weight"] = _scaled(stored, scale)
        elif f".{ending}" not in SCALES.values() or not any(stem + quantised in tensors for quantised in SCALES):
            weights[name] = NewWeight.of(stored)
    return weights


def _scaled(stored: StoredTensor, scale: StoredTensor) -> NewWeight:
    tiles = tuple(-(-size // TILE) for size in stored.shape)
    # a scale of another shape is told by it: the weight then has none that fits
    shape = stored.shape if scale.shape == tiles else (*scale.shape, *stored.shape)

    def int8() -> tuple[torch.Tensor, torch.Tensor]:
        return stored.read(), scale.read()

    def make(old: torch.Tensor) -> torch.Tensor:
        rows, columns = stored.shape
        factors = scale.read().float().repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
        return stored.read().float() * factors

    are_whole = len(shape) == 2 and not any(size % TILE for size in shape)
    return NewWeight((stored.key, scale.key), shape, make, int8 if are_whole else None)


FORMAT = TurboWan()
