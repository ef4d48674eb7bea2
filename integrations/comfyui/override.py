"""A model's self-attention by a Setting: the wrapper of a model call, and the override of its attention.

The wrapper sees the latent, so it works out the call's grid and step. The override sees q, k and v. Both are closures
over a `Run`, for ComfyUI copies a model's options deeply and would copy an object. What belongs to one call lies in
that call's `transformer_options`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.hooks.plan_cache import PlanCache
from dit_accel.pipelines.levels import LEVELS, Case, choose
from dit_accel.plans.plan import Plan, attention
from dit_accel.plans.ramps import Ramped
from dit_accel.registry import DENSE, get_method
from dit_accel.schedule import Step
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid

from .layouts import Layout, ModelClass, arguments_of

KEY = "dit_accel_call"  # in transformer_options during a model call
LOG = logging.getLogger("dit_accel.comfyui")


@dataclasses.dataclass
class Call:
    """One call of the model.

    Attributes:
        layout, plan: of its sequence; no plan: the call is dense.
        dense_layers: indices of the self-attention layers that stay dense; layers count from 0 in the order they run.
        layer: the next layer's index.
        mask: the last mask seen, and its text lengths or why it cannot be honoured.
    """

    layout: Layout
    plan: Plan | None
    dense_layers: frozenset[int] = frozenset()
    layer: int = 0
    mask: tuple[torch.Tensor, torch.Tensor | str] | None = None


class Run:
    """A setting or level at work in one model, with its plans.

    Args:
        setting: a level's name, or a method with its settings.
        dense_start: share of the sampler's first steps that stay dense, unless `setting` names dense_steps.

    Raises:
        DitAccelError: the setting is unknown, or needs what a ComfyUI model does not have.
    """

    def __init__(self, setting: str, dense_start: float, kind: ModelClass) -> None:
        self.kind, self.dense_start = kind, float(dense_start)
        self.level = setting.strip() if setting.strip() in LEVELS else None
        self.setting = None if self.level else self._with_start(Setting.parse(setting), "dense_steps" in setting)
        if self.setting is not None:
            check(self.setting)
        self._plans: dict[str, PlanCache] = {}
        self._said: set[str] = set()

    def _with_start(self, setting: Setting, dense_steps_named: bool = False) -> Setting:
        return setting if dense_steps_named else setting.changed(dense_steps=self.dense_start)

    def say(self, line: str, level: int = logging.INFO) -> None:
        """Log a line once."""
        if line not in self._said:
            self._said.add(line)
            LOG.log(level, "dit_accel: %s", line)

    def setting_for(self, grid: TokenGrid, step: Step | None, device: torch.device) -> Setting:
        """The node's setting, or that of its level for a call of this size, without the level's step cache."""
        if self.setting is not None:
            return self.setting
        assert self.level is not None
        steps = None if step is None else step.count
        case = Case(self.kind.family, (), self.kind.video, grid.visual, steps, device.type != "cpu")
        row = choose(self.level, case)
        chosen = dataclasses.replace(self._with_start(Setting.parse(row.setting)), cache=None)
        if chosen.method == DENSE:
            self.say(
                f"the level {self.level} has no sparse attention for {case}: the model runs dense", logging.WARNING
            )
        else:
            self.say(f"the level {self.level} for {case} is {chosen.text}, without its step cache ({row.source})")
        return chosen

    def begin(self, model: Any, call: dict[str, Any], options: dict[str, Any]) -> Call:
        """The record of a model call."""
        layout, latent = self.kind.layout(model, call), call["x"]
        device = (latent if isinstance(latent, torch.Tensor) else latent[0]).device
        if layout.grid.tokens in layout.others:
            self.say(
                f"{layout.grid.tokens} visual tokens are as many as the text's, so self-attention cannot be told from "
                "cross-attention: the model runs dense",
                logging.WARNING,
            )
            return Call(layout, None)
        step = step_of(options)
        setting = self.setting_for(layout.grid, step, device)
        if setting.method == DENSE:
            return Call(layout, None)
        timed = setting.schedule.by_step or isinstance(setting.config, Ramped)
        if step is None and timed:
            raise DitAccelError(
                "dense steps and ramps need the sampler's sigmas (sample_sigmas), which this sampler does not give. "
                "Set dense_start to 0 and give no ramp."
            )
        if step is not None and setting.schedule.dense_step(step) is not None:
            return Call(layout, None)
        plans = self._plans.setdefault(setting.title, PlanCache(get_method(setting.method)))
        plan = plans.get(setting.config, layout.grid, device, 0.0 if step is None else setting.schedule.place(step))
        density = "chosen in each call" if plan.density is None else f"{plan.density:.3f}"
        self.say(f"{setting.title} on {layout.grid}, density {density}")
        layers = setting.schedule.dense_layers
        assert not isinstance(layers, float), "check refused a share"
        return Call(layout, plan, frozenset(layers if isinstance(layers, tuple) else range(layers)))

    def end(self, call: Call) -> None:
        """After a model call: say so if no attention call was of its grid."""
        if call.plan is not None and not call.layer:
            self.say(
                f"no attention call has the {call.layout.grid.tokens} tokens of {call.layout.grid}: the model runs "
                "dense. Another node may change its tokens",
                logging.WARNING,
            )


def check(setting: Setting) -> None:
    """Refuse a setting that needs what a ComfyUI model does not have."""
    if setting.layers is not None or isinstance(setting.schedule.dense_layers, float):
        raise DitAccelError("The node takes one setting for all layers, and dense_layers as numbers, not as a share.")
    if setting.cache is not None or setting.dense_backend is not None:
        raise DitAccelError("The node changes sparse attention alone. Leave cache and dense_backend out.")
    module = get_method(setting.method).module
    for config in setting.configs():
        if module is not None and (module.when is None or module.when(config)):
            raise DitAccelError(
                f"{setting.title} needs learned weights, which ComfyUI models do not have. Take sol, sparge, radial, "
                "gna or another method without any."
            )
        if config.share != "none" or config.refresh > 1 or config.anchors:
            raise DitAccelError(f"{setting.title} keeps something between calls, which the node cannot. Leave it out.")


def step_of(options: dict[str, Any]) -> Step | None:
    """The step of a model call, from the sampler's sigmas [steps + 1] and the call's sigmas [B]; None without them."""
    sigmas, now = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or now is None or len(sigmas) < 2:
        return None
    trajectory, sigma = sigmas[:-1].float().cpu(), float(now.max())
    reached = int((trajectory >= sigma * (1 - 1e-5)).sum())  # a sampler's inner evaluations lie between two steps
    return Step(max(reached - 1, 0), len(trajectory))


def make_wrapper(run: Run) -> Callable[..., Any]:
    """The wrapper of a model call, for the patcher's wrappers "diffusion_model"."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments_of(executor.class_obj, args, kwargs)
        options = call["transformer_options"]
        options[KEY] = begun = run.begin(executor.class_obj, call, options)
        try:
            result = executor(*args, **kwargs)
        finally:
            del options[KEY]
        run.end(begun)
        return result

    return wrapper


def make_override(run: Run, previous: Callable[..., Any] | None) -> Callable[..., torch.Tensor]:
    """The function for `transformer_options["optimized_attention_override"]`; what stays dense goes to `previous`."""

    def override(
        func: Callable[..., Any],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Any:
        def dense() -> Any:
            shapes = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            keywords = {"mask": mask, "attn_precision": attn_precision, **shapes, **kwargs}
            if previous is None:
                return func(q, k, v, heads, **keywords)
            return previous(func, q, k, v, heads, **keywords)

        call: Call | None = (kwargs.get("transformer_options") or {}).get(KEY)
        tokens = [x.shape[2 if skip_reshape else 1] for x in (q, k, v)]
        if call is None or any(n != call.layout.grid.tokens for n in tokens) or q.shape != k.shape:
            return dense()
        call.layer += 1
        if call.plan is None or call.layer - 1 in call.dense_layers:
            return dense()
        lengths = None if mask is None else _lengths_of(call, mask, len(q))
        if isinstance(lengths, str):
            run.say(f"{lengths}: such calls run dense", logging.WARNING)
            return dense()
        if not skip_reshape:  # [B, N, H * D] to [B, H, N, D]
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = attention(q, k, v, call.plan, kwargs.get("scale"), lengths)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def _lengths_of(call: Call, mask: torch.Tensor, batch: int) -> torch.Tensor | str:
    """`text_lengths`, once a mask."""
    if call.mask is None or call.mask[0] is not mask:
        call.mask = mask, text_lengths(mask, call.layout.grid)
    lengths = call.mask[1]
    return lengths if isinstance(lengths, str) else lengths.expand(batch)


def text_lengths(mask: torch.Tensor, grid: TokenGrid) -> torch.Tensor | str:
    """Valid text tokens of each sample, int32 [B or 1], of a mask that hides the end of the text, or what else it does.

    Args:
        mask: over keys, [B or 1, ..., 1, N]; bool, integers, or floating point to add, where 0 attends.
    """
    if mask.shape[-1] != grid.tokens or (mask.ndim > 2 and mask.numel() != mask.shape[0] * grid.tokens):
        return f"a mask {list(mask.shape)} is not over the {grid.tokens} keys alone"
    rows = mask.reshape(-1, grid.tokens)
    seen = rows == 0 if rows.is_floating_point() else rows.bool()
    text = torch.zeros(grid.tokens, dtype=torch.bool, device=mask.device)
    start = grid.text_start
    text[start : start + grid.text] = True
    inside = seen[:, text]
    lengths = inside.sum(-1, dtype=torch.int32)
    prefix = torch.arange(grid.text, device=mask.device) < lengths[:, None]
    if not bool(seen[:, ~text].all()) or not torch.equal(inside, prefix):
        return "a mask hides other tokens than the end of the text"
    return lengths
