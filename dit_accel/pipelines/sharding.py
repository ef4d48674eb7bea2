"""Which tensors of a call hold tokens that processes share: a family's data, and the hooks that follow it.

Each process has some of the tokens between the first block and the output. Attention gathers them (`context_parallel`),
so whatever else a block computes must belong to single tokens. A family names the arguments that hold a row for each
token, such as positions. Classes that a family does not describe follow their own `_cp_plan`, if Diffusers has one.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from dit_accel.errors import DitAccelError, first_line, lost_process
from dit_accel.plans.ranges import even_shares

IMAGE_TOKENS, TEXT_TOKENS = 0, 1  # streams of tokens that are shared separately; conditioning tokens are the image's
ATTRIBUTE = "_dit_accel_shared"  # of a transformer: its `Shared`
Shares = tuple[int, ...]
Axes = Any  # an axis, or how an argument nests them in tuples and dictionaries; None: the same in every process
Streams = tuple[int | None, ...]
Result = TypeVar("Result")


class At(NamedTuple):
    """The axis of the tokens in a tensor of so many dimensions; others belong to no token."""

    axis: int
    dims: int


class Whole(NamedTuple):
    """The axis along which a module needs all the image's tokens, of which each process has some."""

    axis: int


class Counted(NamedTuple):
    """A number of the image's tokens, counted from the first one or to the last one."""

    to_last: bool = False


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How processes share the tokens of a transformer.

    Modules are named by paths: ``*`` is every module of a list, ``-1`` its last one, "" the transformer.

    Args:
        inputs: by module and argument, where the tokens lie that a process keeps its share of. A tensor of size 1 there
            belongs to all tokens.
        results: by module, the same for what it returns, such as positions.
        outputs: by module, the stream of each tensor that it returns in shares and that is gathered; None: no stream.
        separate: text is shared apart from the image, so a process holds ``[text_r | image_r]``. Otherwise the sequence
            of self-attention is one stream, `IMAGE_TOKENS`.
    """

    inputs: Mapping[str, Mapping[str, Axes]]
    _: dataclasses.KW_ONLY
    outputs: Mapping[str, Streams]
    results: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    separate: bool = False

    @classmethod
    def of_blocks(cls, blocks: str, visual: str = "hidden_states", output: str = "norm_out", **rows: Axes) -> Sharding:
        """That of a list of blocks over one stream, the argument `visual`, gathered behind the module `output`.

        Args:
            rows: further arguments of every block, as in `inputs`.
        """
        every = {f"{blocks}.*": rows} if rows else {}
        return cls({f"{blocks}.0": {visual: 1}} | every, outputs={output: (IMAGE_TOKENS,)})

    @classmethod
    def of_joint_blocks(cls, **rows: Axes) -> Sharding:
        """That of `transformer_blocks` over visual tokens and text, shared apart, before a module `proj_out`."""
        sharding = cls.of_blocks("transformer_blocks", output="proj_out", **rows)
        both = {"transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1}}
        return sharding.with_inputs(both, separate=True)

    def with_inputs(self, inputs: Mapping[str, Mapping[str, Axes]], **changes: Any) -> Sharding:
        """The same with further modules and other settings."""
        return dataclasses.replace(self, inputs={**self.inputs, **inputs}, **changes)

    @classmethod
    def of_class(cls, transformer: nn.Module) -> Sharding | None:
        """That of the class's own `_cp_plan`; None without one."""
        from diffusers.models._modeling_parallel import ContextParallelInput

        plan: Any = getattr(transformer, "_cp_plan", None)
        if not plan:
            return None

        def axes(declared: Any) -> Axes:
            if isinstance(declared, ContextParallelInput):
                return At(declared.split_dim, declared.expected_dims) if declared.expected_dims else declared.split_dim
            return tuple(map(axes, declared))

        inputs: dict[str, dict[str, Axes]] = {}
        results: dict[str, Axes] = {}
        outputs: dict[str, Streams] = {}
        for path, entry in plan.items():
            if not isinstance(entry, dict):
                outputs[path] = (IMAGE_TOKENS,) * (len(entry) if isinstance(entry, (list, tuple)) else 1)
                continue
            inputs[path] = {name: axes(value) for name, value in entry.items() if isinstance(name, str)}
            if returned := {name: axes(value) for name, value in entry.items() if isinstance(name, int)}:
                results[path] = tuple(returned.get(place) for place in range(max(returned) + 1))
        separate = any({"hidden_states", "encoder_hidden_states"} <= entry.keys() for entry in inputs.values())
        return cls(inputs, results=results, outputs=outputs, separate=separate)


def replace_tokens(value: Any, axes: Axes, take: Callable[[torch.Tensor, int], torch.Tensor]) -> Any:
    """An argument with `take(tensor, axis)` for its tensors that hold tokens in an axis, as `axes` say."""
    if value is None or axes is None:
        return value
    if isinstance(axes, At):
        return take(value, axes.axis) if value.ndim == axes.dims and value.shape[axes.axis] > 1 else value
    if isinstance(axes, int):
        return take(value, axes) if value.shape[axes] > 1 else value
    if isinstance(axes, Mapping):
        return {name: replace_tokens(part, axes.get(name), take) for name, part in value.items()}
    return tuple(replace_tokens(part, axis, take) for part, axis in zip(value, axes, strict=True))


def exchange(step: Callable[..., Result]) -> Callable[..., Result]:
    """A function in which processes exchange tokens; a `DitAccelError` says that another process is gone."""

    @functools.wraps(step)
    def exchanging(*args: Any, **kwargs: Any) -> Result:
        try:
            return step(*args, **kwargs)
        except RuntimeError as error:
            if not lost_process(error):
                raise
            raise DitAccelError(
                f"A process that shares this sample no longer answers ({first_line(error).partition('. ')[0]}). Start "
                "all of them again; the one that failed first says why."
            ) from error

    return exchanging


class Shared:
    """The processes that share a transformer's tokens, and the tokens of the call under way.

    Args:
        mesh: one axis of processes.
        sharding: how.

    Attributes:
        tokens: of each stream, in all processes; set before each call by whoever computes the attention, else None.
    """

    def __init__(self, mesh: Any, sharding: Sharding) -> None:
        self.mesh, self.sharding = mesh, sharding
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        self.tokens: tuple[int, int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self  # processes cannot be copied

    def take(self, value: Any, axes: Axes) -> Any:
        """What this process needs of an argument."""
        if value is None:
            return value
        if isinstance(axes, Whole):
            return self.gather(value, axes.axis, self.total(IMAGE_TOKENS))
        if isinstance(axes, Counted):
            shares = even_shares(self.total(IMAGE_TOKENS), self.ranks)
            beside = sum(shares[self.rank + 1 :] if axes.to_last else shares[: self.rank])
            return min(max(value - beside, 0), shares[self.rank])
        return replace_tokens(value, axes, lambda part, axis: part.tensor_split(self.ranks, dim=axis)[self.rank])

    @exchange
    def gather(self, value: torch.Tensor, axis: int, tokens: int) -> torch.Tensor:
        """All of so many tokens, from the share of each process."""
        from diffusers.hooks.context_parallel import EquipartitionSharder

        shares = even_shares(tokens, self.ranks)
        value = value.movedim(axis, 0)
        padding = value.new_zeros(max(shares) - len(value), *value.shape[1:])
        pieces = EquipartitionSharder.unshard(torch.cat((value, padding)), 0, self.mesh).split(max(shares))
        return torch.cat([piece[:share] for piece, share in zip(pieces, shares, strict=True)]).movedim(0, axis)

    def total(self, stream: int) -> int:
        """Tokens of a stream in all processes.

        Raises:
            DitAccelError: nobody computes the attention between the processes.
        """
        if self.tokens is None:
            raise DitAccelError(
                "This transformer's tokens are shared among processes by parallelize(), and its own attention would "
                "see those of one process alone. Call dit_accel.accelerate(pipe, method) first; the method 'dense' "
                "keeps every pair."
            )
        return self.tokens[stream]

    def attach(self, transformer: nn.Module) -> None:
        """Put the hooks on the modules that the sharding names."""
        from diffusers.hooks import HookRegistry

        sharding = self.sharding
        for path in dict.fromkeys((*sharding.inputs, *sharding.results, *sharding.outputs)):
            modules = list(_modules(transformer, path))
            if not modules:
                raise DitAccelError(f"{type(transformer).__name__} has no module {path}; use an unmodified model.")
            for module in modules:
                hook = _hook(
                    self, sharding.inputs.get(path, {}), sharding.results.get(path), sharding.outputs.get(path)
                )
                # "cp_": a step cache keeps such hooks outside its own
                HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, f"cp_shared---{path}")
        setattr(transformer, ATTRIBUTE, self)


def shared_of(transformer: nn.Module) -> Shared | None:
    """The processes that share this transformer's tokens by `parallelize`; None without them."""
    return getattr(transformer, ATTRIBUTE, None)


def _modules(parent: Any, path: str) -> Iterator[nn.Module]:
    """The modules of a path; none where one of its names is missing."""
    name, _, rest = path.partition(".")
    if not name:
        yield parent
    elif name in ("*", "-1"):
        for module in list(parent)[-1:] if name == "-1" else parent:
            yield from _modules(module, rest)
    elif hasattr(parent, name):
        yield from _modules(getattr(parent, name), rest)


def _hook(shared: Shared, inputs: Mapping[str, Axes], results: Axes, outputs: Streams | None) -> Any:
    return _hook_class()(shared, inputs, results, outputs)


@functools.cache
def _hook_class() -> type:
    """Diffusers' hooks are imported with the first pipeline, not with this package."""
    from diffusers.hooks import ModelHook
    from diffusers.utils.torch_utils import unwrap_module

    class SharedHook(ModelHook):
        """Gives a module its share of the arguments, or gathers what it returns."""

        def __init__(self, shared: Shared, inputs: Mapping[str, Axes], results: Axes, outputs: Streams | None) -> None:
            super().__init__()
            self._shared, self._inputs, self._results, self._outputs = shared, inputs, results, outputs
            self._names: list[str] = []
            self._taken: int | None = None  # tokens that the module would have got

        def initialize_hook(self, module: nn.Module) -> nn.Module:
            signature = inspect.signature(type(unwrap_module(module)).forward)
            places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            self._names = [name for name, parameter in signature.parameters.items() if parameter.kind in places][1:]
            return module

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            positional = list(args)
            self._shared.total(IMAGE_TOKENS)
            for name, axes in self._inputs.items():
                if name not in kwargs and name not in self._names[: len(positional)]:
                    continue  # left at its default, or none of this class's
                values: Any = kwargs if name in kwargs else positional
                place: Any = name if name in kwargs else self._names.index(name)
                if self._outputs is not None and isinstance(axes, int):
                    self._taken = values[place].shape[axes]
                values[place] = self._shared.take(values[place], axes)
            return tuple(positional), kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            if self._results is not None:
                output = self._shared.take(output, self._results)
            if self._outputs is None:
                return output
            if isinstance(output, torch.Tensor):
                return self._gather(output, self._outputs[0])
            return tuple(map(self._gather, output, self._outputs))

        def _gather(self, value: Any, stream: int | None) -> Any:
            if value is None or stream is None:
                return value
            return self._shared.gather(value, 1, self._taken or self._shared.total(stream))

    return SharedHook
