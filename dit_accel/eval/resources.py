"""What an evaluation needs, estimated before any weight is fetched: disk, memory of the GPU, hours.

A call of a transformer multiplies every token with every weight (2 operations each), and in each self-attention layer
every query with every key, and the result with every value (4 operations per pair and channel).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.generation import quantised, setup
from dit_accel.generation.weights import weight_bytes

if TYPE_CHECKING:
    from dit_accel.eval.quality import CheckedRequest
    from dit_accel.eval.request import EvalRequest

# Operations a second of whole dense runs on an H100, from Radial Attention's table (arXiv:2506.19852): Wan2.1-14B, 69
# frames of 768x1280 in 1,630 s makes 360e12, and HunyuanVideo, 117 frames in 1,649 s, 390e12.
H100_RATE = 375e12
ALIVE = 12  # tensors of [tokens, channels] that are alive in a block: the residual, norms, q, k, v, and an MLP of four


def estimate(checked: CheckedRequest, request: EvalRequest, settings: int, steps: int | None) -> str:
    """The lines that are printed first; every setting is counted as dense, so that the hours are an upper bound.

    `settings` counts the methods and the baseline.
    """
    grid, items, source = checked.facts["grid"], checked.facts["items"], checked.source
    sizes = weight_bytes(source, checked.dtype)
    names = [name for name in quantised.transformers(source) if name in sizes]
    samples = settings * len(items)
    config = source.config(names[0])
    channels = (config.get("num_attention_heads") or 0) * (config.get("attention_head_dim") or 0)
    heaviest = max(sizes.values()) if request.offload == "model" else sum(sizes.values())
    memory = heaviest + ALIVE * grid.tokens * channels * checked.dtype.itemsize
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in sizes.items())
    lines = [
        f"this evaluation: {samples} samples ({len(items)} of each of {settings} settings), {grid.tokens:,} tokens",
        f"disk: {_gigabytes(sum(sizes.values()))} of weights in {str(checked.dtype).removeprefix('torch.')} ({parts})",
        f"memory: about {_gigabytes(memory)}"
        + (
            ""
            if request.offload == "model"
            else f"; --offload model: the largest part, {_gigabytes(max(sizes.values()))}"
        ),
    ]
    if steps is None or not channels:
        return "\n".join([*lines, "time: unknown, since the model does not say its steps or channels"])
    operations = _operations(checked, sizes[names[0]] / checked.dtype.itemsize, channels)
    guided = _calls(checked, config)
    hours = samples * steps * guided * operations / H100_RATE / 3600
    per_sample = f"{steps} steps, {guided} calls a step, {operations:.2g} operations a call"
    most = f"at most {hours:,.3g}" if hours >= 0.01 else "less than 0.01"
    lines.append(
        f"time: {most} hours of an H100 ({per_sample}, every setting as slow as dense); the processes of "
        "`accelerate launch` share them"
    )
    return "\n".join(lines)


def _operations(checked: CheckedRequest, weights: float, channels: int) -> float:
    """Of one call of the transformer."""
    import diffusers
    import torch

    source, tokens = checked.source, checked.facts["grid"].tokens
    name = quantised.transformers(source)[0]
    kind = getattr(diffusers, source.component_class(name) or "", None)
    if kind is None:
        raise DitAccelError(f"{source.model} has a {source.component_class(name)}, which this Diffusers does not have.")
    with torch.device("meta"):
        layers = len(list(source.family().attentions(kind.from_config(source.config(name)))))
    return 2 * weights * tokens + 4 * layers * tokens**2 * channels


def _calls(checked: CheckedRequest, config: dict[str, Any]) -> int:
    """Calls of the transformer in a step: 2 with classifier-free guidance, which a distilled model embeds instead."""
    scale = setup.default_of(checked.source.pipeline_class(), checked.arguments({}), "guidance_scale")
    return 2 if isinstance(scale, int | float) and scale > 1 and not config.get("guidance_embeds") else 1


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
