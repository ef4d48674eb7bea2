"""A model family: which modules are its self-attention, and where the tokens of a call lie."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.levels import LEVELS
from dit_accel.pipelines.sharding import Sharding
from dit_accel.pipelines.sizes import Config, Sizes
from dit_accel.pipelines.stacks import BlockStack
from dit_accel.plans.anchored import AnchoredPlan
from dit_accel.tokens import TokenGrid

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CallLayout:
    """The places of the tokens of one transformer call.

    Args:
        grid: the sequence that self-attention sees.
        text_lens: int [B], valid text tokens of each sample; the model masks the others, and its attention mask is
            taken to say the same. None: the model passes no mask.
        text_bias: floating point [B, tokens], queries in the grid's order. A model that does not mask padded text adds
            it to the scaled logits of padded text.
        segments: as in `plans.plan.PlanArguments`.
        rows: int64 [B, tokens], a permutation: the row of the call's sequence where each token of the grid lies.
            Attention then copies q, k, v and its output. None: the grid's order, in all samples.
        notes: for the report, such as tokens that stay dense.
        masks: arguments of the call that say the same as `text_lens` and `text_bias`. A call in which every layer is
            sparse omits them, so that the model builds no N x N mask.
    """

    grid: TokenGrid
    _: dataclasses.KW_ONLY
    text_lens: torch.Tensor | None = None
    text_bias: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    segments: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preset:
    """Recommended settings of one method for a family.

    Args:
        config: settings of the method.
        schedule: arguments of `Schedule`; shares rather than numbers, so that they hold for any number of steps.
        source: where they were published, and for what.
    """

    config: Mapping[str, Any]
    schedule: Mapping[str, Any]
    source: str


# Of every video family: steps and layers that stay dense for methods that need no fine-tuning.
TRAINING_FREE = {
    "sol": Preset(
        config={},
        schedule={"dense_steps": 0.2, "dense_layers": 1},
        source="Sol-Attn (arXiv 2607.24027): Wan2.1-14B and HunyuanVideo, the first 20 % of the steps and layer 0 "
        "dense; not published for other models. Blocks of 128 queries in place of 64, for the kernels of an H100",
    ),
    "sparge": Preset(
        config={"topk": 0.25, "topp": 0.0, "score": "subblock"},
        schedule={"dense_steps": 0.2, "dense_layers": 1},
        source="SGLang's SubBlock router without fine-tuning: sparsity 0.75, blocks of 64, cells of 16 tokens, the "
        "first 10 steps dense; the layer as for Sol-Attn (arXiv 2607.24027). Blocks of 128 queries in place of 64",
    ),
    "rectified": Preset(
        config={},
        schedule={"dense_steps": 0.2, "dense_layers": 1},
        source="Rectified SpaAttn (arXiv 2511.19835): drop 0.8 for HunyuanVideo; dense steps and layer as for Sol-Attn "
        "(arXiv 2607.24027); not published for other models",
    ),
}


class ModelInputs:
    """One call of a transformer: its arguments by name, and a cache of values read from small tensors.

    Args:
        signature: of the class's `forward`, with `self`.
        module, args, kwargs: as a forward pre-hook gets them.
        memory: kept by the caller between calls.

    Attributes:
        owner: the transformer's class.
    """

    def __init__(
        self,
        signature: inspect.Signature,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        memory: Memory,
    ) -> None:
        self.owner = type(module).__name__
        self._arguments = signature.bind_partial(module, *args, **kwargs).arguments
        self._memory = memory

    def get(self, name: str) -> Any:
        """The argument, or None if it was not given."""
        return self._arguments.get(name)

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments that were given."""
        return {name: value for name, value in self._arguments.items() if name != "self"}

    def tensor(self, name: str, dims: int) -> torch.Tensor:
        """The argument as a tensor of that many dimensions.

        Raises:
            DitAccelError: it is missing or shaped otherwise.
        """
        value = self.get(name)
        if not isinstance(value, torch.Tensor) or value.ndim != dims:
            came = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise DitAccelError(f"{self.owner} needs {name} as a tensor of {dims} dimensions, got {came}.")
        return value

    def length(self, name: str, dims: int = 3) -> int:
        """Size of the second axis of that argument, a tensor of so many dimensions; errors as in `tensor`."""
        return self.tensor(name, dims).shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the call's first tensor, which is the latent."""
        return tuple(next(_tensors(self._arguments.values())).shape)

    @property
    def device(self) -> torch.device:
        """Device of the call's first tensor."""
        return next(_tensors(self._arguments.values())).device

    def once(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
        """`read(tensor)` on a CPU copy; cached while the same unmodified tensor is passed in every step.

        The copy waits for the device, so it is made only for a new or modified tensor.
        """
        return self._memory.recall(tensor, read)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Memory:
    """Results of reading tensors, cached by tensor object and version.

    Guidance alternates between two masks, so the last few results of each kind are kept.
    """

    ENTRIES = 4

    def __init__(self) -> None:
        self._known: dict[Callable[[torch.Tensor], Any], list[tuple[weakref.ref[torch.Tensor], int, Any]]] = {}

    def recall(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
        if tensor.is_inference():  # has no version, so a modification would go unseen
            return read(tensor.cpu())
        known = self._known.get(read, [])
        for reference, version, result in known:
            if reference() is tensor and version == tensor._version:
                return result
        result = read(tensor.detach().cpu())
        others = [entry for entry in known if entry[0]() is not None and entry[0]() is not tensor]
        self._known[read] = [(weakref.ref(tensor), tensor._version, result), *others][: self.ENTRIES]
        return result


def _head_dim(attention: Any) -> int:
    return int(attention.head_dim if hasattr(attention, "head_dim") else attention.inner_dim // attention.heads)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of Diffusers transformers that share a layout.

    Args:
        name: lower case.
        transformers: class names.
        layout: where the tokens of a call lie.
        sizes: the sizes a model makes, from the configurations of its transformer and its VAE.
        summary: one line for people.
        attention: dotted paths of the self-attention modules in the order they run; ``*`` matches one name, ``a|b``
            either.
        timestep_name: the argument that holds the transformer's timestep.
        timestep_scale: factor that turns it into the scheduler's units, 0 to 1000; None if there is no such factor.
            Then only the scheduler's index, or `set_step`, tells the step.
        timestep_rises: whether the timestep is 1 for the finished image and 0 for noise.
        recommended: settings by method, the one to start with first.
        recommended_pair: settings that differ for pipelines with two transformers on one trajectory.
        visual_attention: paths among `attention` whose modules see visual tokens alone.
        text_is_keys: whether text tokens are keys but not queries. Accelerated attention then pads the queries with
            text rows and drops their output.
        sparse_calls: by processor class, a function that replaces the processor's `__call__` in sparse calls; it takes
            the processor first and calls `processor.attend`.
        head_dim: channels of one head of an attention module.
        extend: the arguments of a call with a plan's anchors behind each frame; None if the family takes no anchors.
        sharding: which tensors of a call processes share; None: those of the class's own `_cp_plan`.
        stack: the blocks that a step cache may skip.
        shardings, stacks: those of transformers that differ, by class name.
    """

    name: str
    transformers: tuple[str, ...]
    layout: Callable[[Any, ModelInputs], CallLayout]
    sizes: Callable[[Config, Config], Sizes]
    summary: str
    attention: tuple[str, ...] = ("transformer_blocks.*.attn1",)
    timestep_name: str = "timestep"
    timestep_scale: float | None = 1.0
    timestep_rises: bool = False
    recommended: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    recommended_pair: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    visual_attention: tuple[str, ...] = ()
    text_is_keys: bool = False
    sparse_calls: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    head_dim: Callable[[Any], int] = _head_dim
    extend: Callable[[ModelInputs, AnchoredPlan], dict[str, Any]] | None = None
    sharding: Sharding | None = None
    shardings: Mapping[str, Sharding] = dataclasses.field(default_factory=dict)
    stack: BlockStack = dataclasses.field(default_factory=BlockStack)
    stacks: Mapping[str, BlockStack] = dataclasses.field(default_factory=dict)

    def heads(self, attention: nn.Module) -> int:
        """Heads of an attention module."""
        module: Any = attention
        return int(module.heads if hasattr(module, "heads") else module.num_heads)

    @staticmethod
    def channels(attention: nn.Module) -> int:
        """Channels of the hidden states that an attention module gets; 0 if it does not tell."""
        return int(getattr(getattr(attention, "to_q", None), "in_features", 0))

    def attentions(self, transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Self-attention modules by name, in the order they run."""
        modules = list(transformer.named_modules())
        for path in self.attention:
            for name, module in modules:
                if fits_path(path, name):
                    yield name, module

    def sees_text(self, name: str) -> bool:
        """Whether the attention module of that name has the text in its sequence."""
        return not any(fits_path(path, name) for path in self.visual_attention)

    def stack_of(self, transformer: nn.Module) -> BlockStack:
        """The blocks of this transformer that a step cache may skip."""
        return _by_class(transformer, self.stacks, self.stack)

    def sharding_of(self, transformer: nn.Module) -> Sharding | None:
        """How processes share the tokens of this transformer; None if neither the family nor its class tells."""
        return _by_class(transformer, self.shardings, self.sharding) or Sharding.of_class(transformer)

    def preset(self, method: str, transformers: int = 1) -> Preset:
        """The recommended settings of a method in a pipeline with that many transformers.

        Raises:
            DitAccelError: there are none; the message names the methods that have some.
        """
        if method not in self.recommended:
            known = f"there are some for {', '.join(self.recommended)}" if self.recommended else "there are none at all"
            raise DitAccelError(
                f"No settings of {method} are recommended for the family {self.name} ({known}); give the settings, "
                f"and no preset. Or take {self.choices}."
            )
        preset = self.recommended[method]
        return self.recommended_pair.get(method, preset) if transformers > 1 else preset

    @property
    def first_preset(self) -> str:
        """The method whose preset to start with.

        Raises:
            DitAccelError: there are no presets.
        """
        if not self.recommended:
            raise DitAccelError(f"The family {self.name} has no presets, so leave preset out. Take {self.choices}.")
        return next(iter(self.recommended))

    @property
    def methods(self) -> str:
        """Which methods a user may name, in words."""
        presets = f"{', '.join(self.recommended)} (which have presets), or any " if self.recommended else "one "
        return f"{presets}that `dit-accel ls` lists"

    @property
    def choices(self) -> str:
        """What a user may name in Python, in words."""
        return f"{self.methods}; or a level: {', '.join(LEVELS)}"

    def timestep(self, call: ModelInputs) -> torch.Tensor | None:
        """The call's timestep in the scheduler's units; None if it is unknown."""
        value = call.get(self.timestep_name)
        if value is None or self.timestep_scale is None:
            return None
        return (1 - value if self.timestep_rises else value) * self.timestep_scale


def _by_class(transformer: nn.Module, others: Mapping[str, T], default: T) -> T:
    """What is declared for the nearest class of a transformer, or the default."""
    names = (kind.__name__ for kind in type(transformer).__mro__)
    return next((others[name] for name in names if name in others), default)


# A family of videos; one with settings of its own adds them to `TRAINING_FREE`.
video_family = functools.partial(Family, recommended=TRAINING_FREE)


def fits_path(path: str, name: str) -> bool:
    """Whether a module's dotted name fits a path, in which ``*`` matches one name and ``a|b`` either."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    wanted = path.split(".")
    return len(parts) == len(wanted) and all(w == "*" or p in w.split("|") for w, p in zip(wanted, parts, strict=True))


def patch_grid(sizes: Sequence[int], patch: Sequence[int], text: int = 0, text_first: bool = False) -> TokenGrid:
    """The grid of a latent of `sizes` (frames, height, width) cut into patches; remainders are dropped.

    Raises:
        DitAccelError: the latent is smaller than a patch.
    """
    frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
    if min(frames, height, width) < 1:
        raise DitAccelError(f"A latent of {sizes} (frames, height, width) is smaller than the model's patch {patch}.")
    return TokenGrid(frames, height, width, text=text, text_first=text_first)
