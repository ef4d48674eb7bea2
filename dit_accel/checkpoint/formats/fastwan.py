"""FastVideo's Wan: trainable sparse attention (VSA) with a gate of the hidden states, DMD in 3 steps, or both.

Every weight differs from Wan's, so the files hold whole transformers. The gate stands beside `attn1`; the 14B model has
half of its names in FastVideo's spelling. FastWan 2.2 5B was trained with dense attention, and its index alone tells
it. How sparse a model was trained is not in its files: 1.3B 0.8, 14B 0.9 (FastVideo's examples).

Source: hao-ai-lab/FastVideo (fastvideo-kernel ops.py, pipelines/stages/denoising.py), Apache-2.0.
"""

from __future__ import annotations

from dit_accel.checkpoint import wan_names
from dit_accel.checkpoint.few_steps import dmd
from dit_accel.checkpoint.model_weights import NewWeight, every
from dit_accel.checkpoint.published import Format, Tuned, WeightReading
from dit_accel.checkpoint.weight_files import StoredModel, WeightFiles

GATE, LEARNED = ".to_gate_compress.", ".attn1.proxy_gate."
PIPELINE = "WanDMDPipeline"  # of FastVideo, in the index of what was distilled
TIMESTEPS, SHIFT = (1000.0, 757.0, 522.0), 8.0
WIDE = 5120  # channels of the 14B model
VSA = {"gate": "hidden", "tile": (4, 4, 4), "block": 64, "rounding": "up", "weigh": "blocks"}


class FastWan(Format):
    """FastVideo's Wan 2.1 and 2.2: sparse attention with a gate (VSA), 3 steps (DMD), or both."""

    name = "fastwan"
    source = "github.com/hao-ai-lab/FastVideo"
    transformers = ("WanTransformer3DModel",)

    def detect(self, files: WeightFiles) -> bool:
        if files.all_have(r"blocks\.0\.to_gate_compress\.weight"):
            return True
        return files.pipeline.get("_class_name") == PIPELINE and not files.all_have(r".*\.proj_l\.weight")

    def tuned(self, files: WeightFiles) -> Tuned:
        """Wan2.1-VSA is sparse and not distilled: its index names Wan's own pipeline, whose sampler it keeps."""
        gate = files.first.shape(f"{GATE}weight")
        sampler = None if files.pipeline.get("_class_name", PIPELINE) != PIPELINE else dmd(TIMESTEPS, SHIFT)
        call = {} if sampler is None else {"num_inference_steps": len(TIMESTEPS), "guidance_scale": 1.0}
        if gate is None:
            return Tuned("dense", {}, call, sampler)
        return Tuned("proxy", {"topk": 0.1 if gate[0] == WIDE else 0.2, **VSA}, call, sampler)

    def read(self, model: StoredModel) -> WeightReading:
        tensors, notes = wan_names.in_diffusers(model.tensors)
        new = {name: wan_names.unflattened(name, NewWeight.of(stored)) for name, stored in tensors.items()}
        learned = {name.replace(GATE, LEARNED): weight for name, weight in new.items() if GATE in name}
        weights = {name: weight for name, weight in new.items() if GATE not in name}
        return WeightReading(weights, learned, every, notes)


FORMAT = FastWan()
