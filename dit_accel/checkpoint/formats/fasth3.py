"""FastVideo's adapter for MiniMax-H3 (FastH3): 4 steps, with sparse attention (VSA) in the variants that hold gates.

The gates stand beside the layers' projections, without a bias. VSA's coarse branch covers the whole sequence there, in
blocks that end with each run of text, conditions and sound. The share of exact tiles is 0.1, as in training.

Sources: hao-ai-lab/FastVideo (models/loader/lora_patch.py, attention/backends/video_sparse_attn_h3.py) and
vllm-project/vllm-omni (models/minimax_h3/fasth3.py), both Apache-2.0.
"""

from __future__ import annotations

import torch

from dit_accel.checkpoint import h3_adapters
from dit_accel.checkpoint.few_steps import h3
from dit_accel.checkpoint.formats.fastwan import VSA
from dit_accel.checkpoint.model_weights import NewWeight
from dit_accel.checkpoint.published import Format, Tuned, WeightReading
from dit_accel.checkpoint.weight_files import StoredModel, WeightFiles
from dit_accel.errors import DitAccelError

CONTAINER = "fastvideo-lora-v2"  # also of FastVideo's adapters that are not distilled
GATE = ".to_gate_compress."
POSITIONS, SHIFT = (0.999, 0.749, 0.5, 0.25), 12.0
COUNTS = {"low_rank_tensors": ("A", "B"), "diff_tensors": ("diff", "diff_b"), "set_weight_tensors": ("set",)}


class FastH3(Format):
    """FastVideo's adapter for MiniMax-H3: 4 steps, with a gate for sparse attention (VSA) or without."""

    name = "fasth3"
    source = "github.com/hao-ai-lab/FastVideo"
    transformers = ("MiniMaxH3Transformer3DModel",)

    def detect(self, files: WeightFiles) -> bool:
        return files.first.metadata.get("format") == CONTAINER or files.all_have(rf".*{GATE}set_weight")

    def tuned(self, files: WeightFiles) -> Tuned:
        """Only an adapter that says it is FastH3's, or nothing, is sampled in 4 steps, which a call counts as 5."""
        sampler = (
            h3(POSITIONS, SHIFT) if "fasth3" in files.first.metadata.get("finetuned_model", self.name).lower() else None
        )
        call = {} if sampler is None else {"num_inference_steps": len(POSITIONS) + 1}
        if files.first.shape(f"{GATE}set_weight") is None:
            return Tuned("dense", {}, call, sampler)
        return Tuned("proxy", {"topk": 0.1, **VSA, "covers": "all"}, call, sampler)

    def read(self, model: StoredModel) -> WeightReading:
        parts = [part for layer in h3_adapters.layers(model).values() for part in layer]
        for key, kinds in COUNTS.items():
            present = sum(part in kinds for part in parts)
            if model.metadata.get(key, str(present)) != str(present):
                raise DitAccelError(
                    f"{model.files[0]} says {key}={model.metadata[key]} and holds {present}. Fetch it again."
                )
        changed, gates = h3_adapters.read(model)
        learned = {}
        for name, weight in gates.items():
            name = name.replace(GATE, ".proxy_gate.")
            learned[name] = weight
            learned[name.removesuffix("weight") + "bias"] = _no_bias(weight)
        return WeightReading(changed, learned, h3_adapters.is_edited)


def _no_bias(weight: NewWeight) -> NewWeight:
    return NewWeight(weight.keys, weight.shape[:1], lambda old: torch.zeros(weight.shape[:1]))


FORMAT = FastH3()
