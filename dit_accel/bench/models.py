"""Whole models declared for measuring: real architecture and size, random weights, one call of the transformer.

Static plans and top-k do not depend on the weights, so a step takes as long as with the published ones.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dit_accel.bench.rows import SHAPES, Setting, check_densities, get_shape
from dit_accel.errors import DitAccelError
from dit_accel.registry import did_you_mean, get_families

MODES = ("eager", "compiled")
PUBLISHED = "published"
DENSITY = 0.1  # what every method is asked for beside its published setting
METHODS = ("gna", "radial", "sla", "tile")
TEXT = 512  # tokens of a text encoder where the shape has none in its sequence

Inputs = dict[str, Any]
Axes = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Model:
    """One transformer at one size.

    Args:
        name: what rows call it, as the attention shape of `bench_rows.SHAPES` that it has.
        transformer: class in Diffusers.
        config: its architecture, as its published ``config.json`` has it where that is not the class's default.
        inputs: makes one call's keywords, of batch 1, from (config, axes, text, dtype).
        axes: frames, rows and columns of the visual tokens.
        text: text tokens that the call has.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    inputs: Callable[[Any, Axes, int, torch.dtype], Inputs]
    axes: Axes
    text: int = TEXT

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The transformer with random weights, made where it runs, as `from_pretrained` makes it: in its own dtype."""
        import diffusers

        kind = getattr(diffusers, self.transformer)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                torch.manual_seed(0)
                return kind(**self.config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(usual)

    def call(self, transformer: nn.Module, device: torch.device, dtype: torch.dtype) -> Inputs:
        """The keywords of one forward call, always the same numbers."""
        torch.manual_seed(1)
        config: Any = transformer.config
        with device:
            return self.inputs(config, self.axes, self.text, dtype) | {"return_dict": False}

    def settings(self) -> list[Setting]:
        """Each method as its family recommends it, and each at `DENSITY`."""
        family = next((found for found in get_families().values() if self.transformer in found.transformers), None)
        published = {} if family is None else family.recommended
        methods = [method for method in METHODS if self.axes[0] > 1 or method in ("gna", "sla")]
        found = [Setting(method, None, published[method].config) for method in methods if method in published]
        return found + [Setting(method, DENSITY) for method in methods]


@dataclasses.dataclass(frozen=True)
class Step:
    """One declared measurement: a model, a method's setting, eager or compiled."""

    model: Model
    setting: Setting
    mode: str

    @property
    def asked(self) -> str:
        """The density asked for, or that the setting is a published one."""
        return PUBLISHED if self.setting.density is None else f"{self.setting.density:g}"

    @property
    def name(self) -> str:
        """``MODEL/METHOD/DENSITY/MODE``."""
        return "/".join((self.model.name, self.setting.title, self.asked, self.mode))

    def as_dict(self) -> dict[str, Any]:
        """The declaration as plain values."""
        config = self.setting.config
        return {
            "row": self.name,
            "model": self.model.name,
            "method": self.setting.method,
            "setting": self.asked,
            "config": None if config is None else dict(config),
            "mode": self.mode,
        }


def wan_inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": torch.randn(1, config.in_channels, *_latent(axes, config.patch_size), dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_dim, dtype=dtype),
    }


def hunyuan_inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> Inputs:
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return {
        "hidden_states": torch.randn(1, config.in_channels, *_latent(axes, patch), dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.long),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "guidance": torch.tensor([6000.0], dtype=dtype) if config.guidance_embeds else None,
    }


def flux_inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> Inputs:
    _, height, width = axes
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return {
        "hidden_states": torch.randn(1, height * width, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": nn.functional.pad(places, (1, 0)).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype) if config.guidance_embeds else None,
    }


def cogvideox_inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = _latent(axes, (1, config.patch_size, config.patch_size))
    frames_of, rows, columns = axes
    crop, device = ((0, 0), (rows, columns)), torch.get_default_device()
    rotary = get_3d_rotary_pos_embed(config.attention_head_dim, crop, (rows, columns), frames_of, device=device)
    return {
        "hidden_states": torch.randn(1, frames, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim, dtype=dtype),
        "image_rotary_emb": rotary if config.use_rotary_positional_embeddings else None,
    }


def _latent(axes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    return tuple(size * step for size, step in zip(axes, patch, strict=True))


def _declare(name: str, transformer: str, inputs: Callable[..., Inputs], **config: Any) -> Model:
    shape = get_shape(name)
    return Model(name, transformer, config, inputs, shape.axes, shape.text or TEXT)


WAN = "WanTransformer3DModel"
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _declare("wan-1.3b-480p", WAN, wan_inputs, num_attention_heads=12, ffn_dim=8960, num_layers=30),
        _declare("wan-14b-480p", WAN, wan_inputs),
        _declare("wan-14b-720p", WAN, wan_inputs),
        _declare("hunyuan-720p", "HunyuanVideoTransformer3DModel", hunyuan_inputs),
        _declare("flux-4k", "FluxTransformer2DModel", flux_inputs, guidance_embeds=True),
        _declare(
            "cogvideox", "CogVideoXTransformer3DModel", cogvideox_inputs,
            num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True,
        ),
    )
}  # fmt: skip


def select_steps(
    models: Sequence[str] | None = None,
    settings: Sequence[Setting] | None = None,
    densities: Sequence[float] | None = None,
    modes: Sequence[str] | None = None,
    pattern: str = "*",
) -> list[Step]:
    """Declared steps, narrowed down: model by model and mode by mode, so that each is built once.

    Args:
        models: names; None: all.
        settings: methods with settings of their own, or without: then those declared for the model.
        densities: of the methods without settings; None: the published setting and `DENSITY`.
        modes: "eager", "compiled"; None: both.
        pattern: of names, with the wildcards of a shell.

    Raises:
        DitAccelError: a model or mode is unknown, a density is not in (0, 1], or nothing is left.
    """
    check_densities(densities or ())
    for name in models or ():
        if name not in MODELS:
            raise DitAccelError(f"Unknown model {name!r}.{did_you_mean(name, MODELS)} Models: {', '.join(MODELS)}.")
    for mode in modes or ():
        if mode not in MODES:
            raise DitAccelError(f"A mode is one of {', '.join(MODES)}; got {mode!r}.")
    chosen = []
    for model, mode in itertools.product([MODELS[name] for name in models or MODELS], modes or MODES):
        asked = None if settings is None else {setting.method for setting in settings if setting.config is None}
        own = [setting for setting in model.settings() if asked is None or setting.method in asked]
        if densities:
            own = [Setting(method, density) for method in dict.fromkeys(s.method for s in own) for density in densities]
        own += [setting for setting in settings or () if setting.config is not None]
        chosen += [Step(model, setting, mode) for setting in own]
    chosen = [step for step in chosen if fnmatch.fnmatchcase(step.name, pattern)]
    if not chosen:
        raise DitAccelError(f"No step of a model matches {pattern!r}; steps are named MODEL/METHOD/DENSITY/MODE.")
    return chosen


assert set(MODELS) <= set(SHAPES)
