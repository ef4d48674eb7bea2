"""LightX2V's Turbo-SLA for MiniMax-H3: a LoRA of every projection for 4 steps, tuned with 15 % of the key blocks.

It holds no sparse weights, and no alpha: LightX2V gives 128 beside the file. Its attention has no linear branch either,
so `sparge` by number is the same. There text, conditions and sound are sparse too; here they stay exact.

Source: ModelTC/LightX2V (common/ops/attn/dynamic_sparse_attn.py, networks/minimax_h3/lora.py), Apache-2.0.
"""

from __future__ import annotations

from dit_accel.checkpoint import h3_adapters
from dit_accel.checkpoint.few_steps import h3
from dit_accel.checkpoint.published import Format, Tuned, WeightReading
from dit_accel.checkpoint.weight_files import StoredModel, WeightFiles

ALPHA = 128.0
POSITIONS, SHIFT = (1.0, 0.75, 0.5, 0.25), 6.0
PAIRS = r"(.*\.)?transformer_blocks\.\d+\.attn\.to_q\.lora(_A|_A\.default|[._]down)\.weight"


class TurboSla(Format):
    """LightX2V's LoRA for MiniMax-H3: 4 steps and 15 % of the key blocks."""

    name = "turbosla"
    source = "huggingface.co/lightx2v/Minimax-h3-Turbo-SLA"
    transformers = ("MiniMaxH3Transformer3DModel",)

    def detect(self, files: WeightFiles) -> bool:
        """A plain LoRA of that family's blocks, whose metadata name no other format."""
        plain = all(".lora" in name for name in files.first.tensors)
        return plain and files.all_have(PAIRS) and files.first.metadata.get("format", "pt") == "pt"

    def tuned(self, files: WeightFiles) -> Tuned:
        call = {"num_inference_steps": len(POSITIONS) + 1}
        return Tuned("sparge", {"topk": 0.15, "topp": 0.0}, call, h3(POSITIONS, SHIFT))

    def read(self, model: StoredModel) -> WeightReading:
        changed, _ = h3_adapters.read(model, ALPHA)
        notes = (
            "the file names no alpha, and 128 is taken; a LoRA that was not tuned for sparse attention looks the same: "
            "load such a one with load_lora_weights",
        )
        return WeightReading(changed, {}, h3_adapters.is_edited, notes)


FORMAT = TurboSla()
