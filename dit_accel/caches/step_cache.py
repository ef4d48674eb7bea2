"""A step cache and its settings as one value: ``mag:threshold=0.12``.

Most caches are Diffusers' own, and the names of their settings are those of its config classes:

- ``first-block``: FirstBlockCache, skips all blocks but the first where the first block's residual hardly changes;
- ``mag``: MagCache, skips all blocks while the residual's expected magnitude has drifted little;
- ``taylorseer``: TaylorSeer, predicts outputs from those of earlier steps;
- ``sea``: SeaCache, skips blocks by a spectral indicator of the latent;
- ``faster``: FasterCache, reuses attention outputs and the unguided half of a batch;
- ``pab``: Pyramid Attention Broadcast, reuses attention outputs.

One is ours: ``steps`` computes the steps of a list and skips all blocks in the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dit_accel.errors import DitAccelError, first_line
from dit_accel.registry import did_you_mean, none_of, parse_settings, plain, refuse_unknown, value_text
from dit_accel.values import fits, in_words

CONFIGS = {
    "first-block": "FirstBlockCacheConfig",
    "mag": "MagCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "sea": "SeaCacheConfig",
    "faster": "FasterCacheConfig",
    "pab": "PyramidAttentionBroadcastConfig",
    "steps": "ChosenSteps",
}
LEAST_ONE = ("cache_interval", "max_order", "num_inference_steps", "max_skip_steps")
FORM = "NAME[:key=value,...]"
NO_CACHE = "none"  # drops the cache of a level or of a file


@dataclasses.dataclass(frozen=True)
class ChosenSteps:
    """The steps that run; each other step reuses what the last one that ran has left, or forecasts it.

    The forecast is the damped trend of Gardner and McKenzie (Management Science 31(10), 1985). The trend t is what has
    changed since the computed step before, divided by the steps between. What a computed step leaves, r, is
    r + (d + d^2 + ... + d^h) t at h steps later. Without damping it is TaylorSeer's first order (arXiv:2503.06923).

    Args:
        computed: indices of steps, two or more, ascending from 0. A shorter run has only the first of them.
        num_inference_steps: of the runs that the list is for; None: any.
        reuse: what is left: what the blocks added ("residual"), or what the last block returned ("output").
        damping: d, from 0 to 1; 0 reuses what is left as it is, 1 goes on along a line.
    """

    computed: tuple[int, ...] = ()
    num_inference_steps: int | None = None
    reuse: Literal["residual", "output"] = "residual"
    damping: float = 0.0

    def __post_init__(self) -> None:
        chosen, steps = "x".join(map(str, self.computed)) or "none", self.num_inference_steps
        if len(self.computed) < 2 or self.computed[0] or list(self.computed) != sorted(set(self.computed)):
            raise ValueError(
                f"computed={chosen} must be two steps or more in ascending order from 0. Give the steps that run, such "
                "as computed=0x1x2x6."
            )
        if steps is not None and self.computed[-1] >= steps:
            raise ValueError(
                f"computed={chosen} has step {self.computed[-1]}, and num_inference_steps={steps} ends with step "
                f"{steps - 1}. Leave the step out, or name the runs of more steps."
            )
        if not 0 <= self.damping <= 1:
            raise ValueError(
                f"damping={self.damping:g} must be from 0, which reuses, to 1, which goes on along a line. Try 0.6."
            )

    def check(self, steps: int | None) -> None:
        """Refuse a run of `steps` steps that the list is not for."""
        if steps is not None and self.num_inference_steps not in (None, steps):
            chosen = "x".join(map(str, self.computed))
            raise DitAccelError(
                f"computed={chosen} is for runs of {self.num_inference_steps} steps, and this one has {steps}. Give a "
                f"list for {steps} steps."
            )

    def reach(self, steps: int) -> float:
        """The share of the trend that is added so many steps later."""
        return sum(self.damping**step for step in range(1, steps + 1))


@dataclasses.dataclass(frozen=True)
class StepCache:
    """A step cache with settings.

    Args:
        name: one of `CONFIGS`.
        config: settings that differ from the defaults of Diffusers' config class, plain values. Callbacks are not among
            them. ``mag_ratios`` of "mag" is one number for all steps, numbers, a name among
            `dit_accel.caches.ratios.published`, or the path of a calibration; with ``calibrate`` the report has the
            ratios of a run that computes every step.

    Raises:
        DitAccelError: the name, a setting or a value is unknown to Diffusers, or Diffusers is not installed.
    """

    name: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in CONFIGS:
            raise DitAccelError(
                f"Unknown step cache {self.name!r}.{did_you_mean(str(self.name), CONFIGS)} Caches: "
                f"{', '.join(CONFIGS)}."
            )
        hints = _hints(self.name)
        refuse_unknown(self.config, list(hints), self.name)
        config = {name: none_of(plain(value), hints[name]) for name, value in self.config.items()}
        object.__setattr__(self, "config", config)
        for name, value in self.config.items():
            _check(self.name, name, value, hints[name])
        if self.name != "mag":  # whose ratios follow with the run
            self.build()

    @classmethod
    def parse(cls, text: str) -> StepCache:
        """Read ``NAME[:key=value,...]``; the values are written as in a method's settings.

        Example:
            >>> StepCache.parse("mag:threshold=0.12,max_skip_steps=4").config
            {'threshold': 0.12, 'max_skip_steps': 4}
        """
        name, _, rest = text.partition(":")
        return cls(name.strip(), parse_settings(rest.split(",") if rest else (), name))

    @classmethod
    def of(cls, value: StepCache | str | Mapping[str, Any] | None) -> StepCache | None:
        """A cache from itself, from text or from `as_dict`; None for None and for "none"."""
        if value is None or isinstance(value, cls):
            return value
        if value == NO_CACHE:
            return None
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping):
            raise DitAccelError(
                f"A step cache is text such as 'mag:threshold=0.12', a StepCache or its dictionary, got {value!r}."
            )
        refuse_unknown(value, ["name", "config"], "a step cache")
        return cls(str(value.get("name")), value.get("config", {}))

    @property
    def breaks_graphs(self) -> bool:
        """Whether it decides within a call, in code that `torch.compile` does not trace."""
        return self.name != "steps"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `of` reads them."""
        return {"name": self.name, "config": dict(self.config)}

    def __str__(self) -> str:
        settings = ",".join(f"{name}={value_text(value)}" for name, value in self.config.items())
        return f"{self.name}:{settings}" if settings else self.name

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.config.items(), key=lambda item: item[0]))))

    def build(self, **more: Any) -> Any:
        """The config with these settings and further arguments: `ChosenSteps` or Diffusers'.

        TaylorSeer takes its lite mode unless a setting says which modules it replaces: in Diffusers 0.42.1 the other
        default finds no module in most models.
        """
        hints = _hints(self.name)
        settings = {name: _diffusers(value, hints[name]) for name, value in self.config.items()}
        if self.name == "taylorseer" and not {"skip_predict_identifiers", "cache_identifiers"} & set(settings):
            settings.setdefault("use_lite_mode", True)
        try:
            return _kind(self.name)(**{**settings, **more})
        except (ValueError, TypeError) as error:
            raise DitAccelError(f"{self.name}: {first_line(error).replace('`', '')}") from error


def _kind(name: str) -> Any:
    if name == "steps":
        return ChosenSteps
    try:
        from diffusers import hooks
    except ImportError as error:
        raise DitAccelError("A step cache is Diffusers'. Install it: pip install diffusers==0.42.1") from error
    return getattr(hooks, CONFIGS[name])


def _hints(name: str) -> dict[str, Any]:
    """Annotations of the settings that are values: callbacks follow from the pipeline."""
    hints = typing.get_type_hints(_kind(name))
    return {
        field: str | float | tuple[float, ...] if field == "mag_ratios" else hint
        for field, hint in hints.items()
        if not field.endswith("_callback") and not field.startswith("_")
    }


def _check(cache: str, name: str, value: Any, hint: Any) -> None:
    # (-1, 681) is published; a cache's own class refuses what is out of the range of damping
    within = name.endswith(("timestep_skip_range", "timestep_range")) or name == "damping"
    low = 1 if name in LEAST_ONE or (name.endswith("_skip_range") and not within) else 0
    with contextlib.suppress(DitAccelError):
        if not fits(_diffusers(value, hint), hint):
            raise DitAccelError("")
        numbers = [
            number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, (int, float))
        ]
        if all(math.isfinite(number) and (within or number >= low) for number in numbers):
            return
    kinds = {hint, *typing.get_args(hint)}
    least = f", {low} or more" if {int, float} & kinds and not within else ""
    form = " Write a list as 0x1x2." if any(typing.get_origin(kind) in (tuple, list) for kind in kinds) else ""
    raise DitAccelError(f"{cache}'s {name} must be {in_words(hint)}{least}, got {value!r}.{form}")


def _diffusers(value: Any, hint: Any) -> Any:
    """A value as Diffusers takes it: lists for tuples where only those fit, types for their names."""
    import torch

    options = (hint, *typing.get_args(hint))
    if isinstance(value, str) and torch.dtype in options:
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise DitAccelError(f"{value!r} is no type of PyTorch's, such as float32 or bfloat16.")
        return dtype
    return (
        list(value)
        if isinstance(value, tuple) and any(typing.get_origin(option) is list for option in options)
        else value
    )
