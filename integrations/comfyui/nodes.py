"""The node."""

from __future__ import annotations

from typing import Any

try:
    from dit_accel.errors import DitAccelError
except ImportError as missing:
    raise ImportError("The node needs dit_accel in ComfyUI's Python: pip install dit_accel") from missing

from .layouts import class_of
from .override import Run, make_override, make_wrapper


class SparseAttention:
    """Sparse self-attention for a model, by a level or by a method with its settings."""

    CATEGORY = "model_patches/attention"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    DESCRIPTION = "Runs the self-attention of a diffusion transformer sparsely. Text tokens stay exact."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        setting = "A level (faithful, balanced, fast), or a method with settings, such as sol:tau=1.0 or radial"
        start = "The share of the sampler's first steps that stay dense"
        return {
            "required": {
                "model": ("MODEL",),
                "setting": ("STRING", {"default": "balanced", "tooltip": setting}),
                "dense_start": ("FLOAT", {"default": 0.2, "min": 0.0, "max": 1.0, "step": 0.05, "tooltip": start}),
            }
        }

    def apply(self, model: Any, setting: str, dense_start: float) -> tuple[Any]:
        """A copy of the model with sparse attention.

        Args:
            model: ComfyUI's model patcher.
            setting: a level's name, or a method's text as `Setting.parse` reads it.
            dense_start: in [0, 1].

        Raises:
            DitAccelError: the model's class or the setting is refused, with the reason.
        """
        kind = class_of(model.get_model_object("diffusion_model"))
        run = Run(setting, dense_start, kind)
        patched = model.clone()
        options = patched.model_options.setdefault("transformer_options", {})
        if options.get("dit_accel"):
            raise DitAccelError("The model has sparse attention of dit_accel already. Use one node.")
        options["dit_accel"] = True
        previous = options.get("optimized_attention_override")
        options["optimized_attention_override"] = make_override(run, previous)
        patched.add_wrapper_with_key("diffusion_model", "dit_accel", make_wrapper(run))
        return (patched,)
