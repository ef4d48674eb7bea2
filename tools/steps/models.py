"""The declared steps: transformers of published models, with methods as published and at a tenth of the pairs."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dit_accel.bench.rows import Axes, Shape, Target, check_densities, check_known, get_shape
from dit_accel.errors import DitAccelError
from dit_accel.registry import did_you_mean, family_of

MODES = ("eager", "compiled")
DENSITY = 0.1  # of every method, besides its published setting


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's transformer with random weights, which do not change the time of a step.

    Args:
        shape: of its attention.
        kind: class in Diffusers.
        inputs: makes one call's keywords, of batch 1, from (config, axes, text tokens, dtype).
        config: the values of its published ``config.json`` that differ from the class's defaults.
        text: text tokens of the call, if the sequence has none.
    """

    shape: Shape
    kind: str
    inputs: Callable[[Any, Axes, int, torch.dtype], dict[str, Any]]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: int = 0

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The transformer, made on its device and in its dtype, as `from_pretrained` makes it."""
        import diffusers

        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                torch.manual_seed(0)
                transformer: nn.Module = getattr(diffusers, self.kind)(**self.config)
                return transformer.eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(usual)

    def targets(self, densities: Sequence[float] | None) -> list[Target]:
        """Each method at the densities; None: as the model's family recommends it, and at `DENSITY`."""
        methods, family = self.shape.methods(), family_of([self.kind])
        known = {} if densities or family is None else family.recommended
        published = [Target.of(method.name, **known[method.name].config) for method in methods if method.name in known]
        return published + [Target(method.name, share) for method in methods for share in densities or (DENSITY,)]


def wan(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.in_channels, *latent(axes, config.patch_size), dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_dim, dtype=dtype),
    }


def hunyuan(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return {
        "hidden_states": torch.randn(1, config.in_channels, *latent(axes, patch), dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.long),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "guidance": torch.tensor([6000.0], dtype=dtype) if config.guidance_embeds else None,
    }


def flux(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    _, height, width = axes
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return {
        "hidden_states": torch.randn(1, height * width, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.nn.functional.pad(places, (1, 0)).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype) if config.guidance_embeds else None,
    }


def cogvideox(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = latent(axes, (1, config.patch_size, config.patch_size))
    frames_of, rows, columns = axes
    crop, device = ((0, 0), (rows, columns)), torch.get_default_device()
    rotary = get_3d_rotary_pos_embed(config.attention_head_dim, crop, (rows, columns), frames_of, device=device)
    return {
        "hidden_states": torch.randn(1, frames, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim, dtype=dtype),
        "image_rotary_emb": rotary if config.use_rotary_positional_embeddings else None,
    }


def latent(axes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Sides of the latent that a patch cuts into that many tokens, by axis."""
    return tuple(size * step for size, step in zip(axes, patch, strict=True))


SMALL_WAN = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
MODELS = (
    Model(get_shape("cogvideox"), "CogVideoXTransformer3DModel", cogvideox, COGVIDEOX_5B),
    Model(get_shape("flux-4k"), "FluxTransformer2DModel", flux, {"guidance_embeds": True}),
    Model(get_shape("hunyuan-720p"), "HunyuanVideoTransformer3DModel", hunyuan),
    Model(get_shape("wan-1.3b-480p"), "WanTransformer3DModel", wan, SMALL_WAN, text=512),
    Model(get_shape("wan-14b-480p"), "WanTransformer3DModel", wan, text=512),
    Model(get_shape("wan-14b-720p"), "WanTransformer3DModel", wan, text=512),
)


def get_model(name: str) -> Model:
    """The declared model with a shape of that name; an error suggests the nearest one."""
    known = {model.shape.name: model for model in MODELS}
    if name not in known:
        raise DitAccelError(f"Unknown model {name!r}.{did_you_mean(name, known)} Models: {', '.join(known)}.")
    return known[name]


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """One measurement: a model, what to measure of it, eager or compiled."""

    model: Model
    target: Target
    mode: str

    @property
    def density_text(self) -> str:
        """The density, or "published" for a published setting."""
        return "published" if self.target.density is None else f"{self.target.density:g}"

    @property
    def name(self) -> str:
        """``MODEL/METHOD/DENSITY/MODE``."""
        return "/".join((self.model.shape.name, self.target.title, self.density_text, self.mode))

    def as_dict(self) -> dict[str, Any]:
        """The declaration as plain values."""
        setting = self.target.setting
        return {
            "row": self.name,
            "model": self.model.shape.name,
            "method": self.target.method,
            "setting": self.density_text,
            "config": None if setting is None else setting.as_dict()["config"],
            "mode": self.mode,
        }


def select_steps(
    models: Sequence[str] | None = None,
    targets: Sequence[Target] | None = None,
    densities: Sequence[float] | None = None,
    modes: Sequence[str] | None = None,
    pattern: str = "*",
) -> list[ModelStep]:
    """Selected steps, by model and mode, so that each model is built once.

    Args:
        models: names; None: all.
        targets: methods with settings, or without: those declared for the model.
        densities: of methods without settings; None: see `Model.targets`.
        modes: "eager", "compiled"; None: both.
        pattern: of names, with the wildcards of a shell.
    """
    check_known("mode", modes, MODES)
    check_densities(densities)
    chosen = MODELS if models is None else tuple(map(get_model, models))
    open_ended = None if targets is None else {target.method for target in targets if target.setting is None}
    whole = [target for target in targets or () if target.setting is not None]
    steps = [
        ModelStep(model, target, mode)
        for model, mode in itertools.product(chosen, modes or MODES)
        for target in [
            *(target for target in model.targets(densities) if open_ended is None or target.method in open_ended),
            *whole,
        ]
    ]
    matching = [step for step in steps if fnmatch.fnmatchcase(step.name, pattern)]
    if not matching:
        raise DitAccelError(
            f"No declared row matches {pattern!r}. Rows are named MODEL/METHOD/DENSITY/MODE; --list shows them."
        )
    return matching
