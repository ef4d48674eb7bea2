"""A ComfyUI node that runs a model's self-attention with dit_accel. It imports nothing of ComfyUI."""

from .nodes import SparseAttention

NODE_CLASS_MAPPINGS = {"DitAccelSparseAttention": SparseAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"DitAccelSparseAttention": "Sparse attention (dit_accel)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
