"""Tokens along a curve from block to block: permuted once before a run of sparse layers, and back behind it.

Otherwise each attention call along a curve permutes q, k and v, and its output back: four copies a layer. A run copies
the visual stream twice, and every tensor with a row for each token, such as positions, once.

A run is of consecutive blocks whose layers attend along one curve in this call. Dense layers are never in a run, so the
model's own attention sees its tokens in its own order, and nothing is permuted in dense steps. A step cache reads what
the first and the last block take and return. Then those two are in no run, and what it keeps is in the model's order.
A block is in no run either while somebody's hooks in it may read tokens. An exported graph has no runs: it would hold
the rows of one grid.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dit_accel.caches.at_work import CacheAtWork
from dit_accel.caches.hooking import present_cache
from dit_accel.hooks.accelerated_layer import AcceleratedLayer
from dit_accel.pipelines import context_parallel
from dit_accel.pipelines.attention import AtWork
from dit_accel.pipelines.family import CallLayout, Family
from dit_accel.pipelines.sharding import Counted, replace_tokens
from dit_accel.pipelines.stacks import BlockStack, Streams
from dit_accel.plans import ramps
from dit_accel.plans.curves import Curve, Rows, rows_along
from dit_accel.plans.routed import RoutedPlan
from dit_accel.tokens import TokenGrid

# by kind of layer: plan, implementation and reason, or why it is dense
Decisions = Mapping[Any, tuple[Any, str, str] | str]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of a module


class SharedCopies:
    """Copies along a curve of tensors that many blocks get, such as positions, while their transformer is called.

    Blocks that are recomputed behind the call make their own.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, Rows, torch.Tensor]] = []
        self._open = False

    def open(self) -> None:
        """A call begins."""
        self._open = True

    def close(self, *call: Any) -> None:
        """A call ends, or has failed."""
        self._open = False
        self._copies.clear()

    def clear(self) -> None:
        """A run ends."""
        self._copies.clear()

    def get(self, value: torch.Tensor, rows: Rows, copy: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The copy of a tensor along `rows`, which `copy` makes."""
        for original, along, present in self._copies:
            if original is value and along is rows:
                return present
        copied = copy()
        if self._open:
            self._copies.append((value, rows, copied))
        return copied


class ArrangedBlock(AtWork):
    """The hooks of one block.

    Args:
        stack: the block's.
        streams: what it returns.
        copies: of the transformer.

    Attributes:
        layers: its self-attention.
        counts: whether it counts tokens in the model's order.
        rows: of the run that the block is in; None if its tokens are in the model's order.
        first, last: whether the run begins or ends here.
    """

    def __init__(self, block: nn.Module, stack: BlockStack, streams: Streams, copies: SharedCopies) -> None:
        from diffusers.utils.torch_utils import unwrap_module

        self._block, self._copies, self._visual = block, copies, stack.visual
        names = list(inspect.signature(type(unwrap_module(block)).forward).parameters)[1:]
        self._places = {name: place for place, name in enumerate(names)}
        self._returned = None if len(streams) == 1 else streams.index(stack.visual)
        self._by_token = {name: axes for name, axes in (stack.by_token or {}).items() if name in names}
        self.counts = any(isinstance(axes, Counted) for axes in self._by_token.values())
        self.layers: list[AcceleratedLayer] = []
        self.rows: Rows | None = None
        self.first = self.last = False

    @property
    def compiled(self) -> bool:
        """Whether the block is compiled by itself."""
        return getattr(self._block, "_compiled_call_impl", None) is not None

    @property
    def watched(self) -> bool:
        """Whether hooks in the block may read its tokens."""
        modules = [vars(module) for module in self._block.modules()]
        hooks = [hook for module in modules for kind in HOOKS if module.get(kind) for hook in module[kind].values()]
        return any(map(_may_read_tokens, hooks))

    def attach(self) -> Iterator[Any]:
        """Hook the block; the handles."""
        yield self._block.register_forward_pre_hook(self._before, with_kwargs=True)
        yield self._block.register_forward_hook(self._behind)

    def set(self, rows: Rows | None, first: bool = False, last: bool = False) -> None:
        """Decide the call under way."""
        self.rows, self.first, self.last = rows, first, last
        for layer in self.layers:
            layer.ours.arranged = rows is not None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.rows is None or torch.compiler.is_exporting():
            return None
        positional, keywords = list(args), dict(kwargs)
        for name, axes in (*self._by_token.items(), *(((self._visual, 1),) if self.first else ())):
            values: Any = keywords if name in keywords else positional
            place: Any = name if name in keywords else self._places[name]
            if name in keywords or place < len(positional):
                take = self._take if name == self._visual else self._take_shared
                values[place] = replace_tokens(values[place], axes, take)
        return tuple(positional), keywords

    def _take(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        assert self.rows is not None
        return value.index_select(axis, self.rows[0].to(value.device))

    def _take_shared(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        """`_take`, once for all blocks; each takes its own where gradients flow, so that none of them sums the others'.

        A traced call has no call's copies.
        """
        if torch.compiler.is_compiling() or value.requires_grad:
            return self._take(value, axis)
        assert self.rows is not None
        return self._copies.get(value, self.rows, lambda: self._take(value, axis))

    def _behind(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.last or torch.compiler.is_exporting():
            return None
        assert self.rows is not None
        self._copies.clear()
        outputs = [output] if self._returned is None else list(output)
        place = self._returned or 0
        outputs[place] = outputs[place].index_select(1, self.rows[1].to(outputs[place].device))
        return outputs[0] if self._returned is None else tuple(outputs)


class ArrangedStack(AtWork):
    """The blocks of one transformer, whose runs of layers find their tokens along a curve.

    Args:
        layers: the transformer's, in the order they run.
        cache: its step cache; None without one.

    Attributes:
        notes: for the report, why layers permuted their tokens themselves.
    """

    def __init__(
        self, transformer: nn.Module, family: Family, layers: Sequence[AcceleratedLayer], cache: CacheAtWork | None
    ) -> None:
        self._transformer, self._cache = transformer, cache
        stack = family.stack_of(transformer)
        self._with_text = all(len(streams) == 1 for streams in stack.lists.values())
        self._copies = SharedCopies()
        blocks = list(stack.blocks(transformer))
        self._blocks = [ArrangedBlock(block, stack, streams, self._copies) for _, block, streams in blocks]
        for (name, _, _), block in zip(blocks, self._blocks, strict=True):
            block.layers = [layer for layer in layers if layer.name.startswith(f"{name}.")]
        kind = type(transformer).__name__
        self._reason: str | None = None
        if stack.by_token is None:
            self._reason = f"nothing says that the blocks of {kind} take tokens in any order"
        elif any(block.counts for block in self._blocks):
            self._reason = f"the blocks of this {kind} count the tokens of the first frame"
        self._rows_along: dict[tuple[Curve, TokenGrid, torch.device], Rows] = {}
        self.notes: list[str] = []
        self._attached = False

    def attach(self) -> list[Any]:
        """Hook the blocks; the handles."""
        configs = [layer.config for block in self._blocks for layer in block.layers if layer.config is not None]
        curved = any(ramps.at(config).curve for config in configs)
        self._attached = curved and self._reason is None
        if not self._attached:
            return []
        release = self._transformer.register_forward_hook(self._copies.close, always_call=True)
        return [release, *(handle for block in self._blocks for handle in block.attach())]

    def end(self) -> None:
        """Permute nothing until `begin`."""
        self._copies.close()
        for block in self._blocks:
            block.set(None)

    def begin(self, layout: CallLayout, device: torch.device, last: Decisions) -> None:
        """Decide for a sparse call which blocks are in runs.

        Args:
            last: of the engine, for this call.
        """
        curves = [self._curve(block, last) for block in self._blocks]
        if not any(curves):
            return
        reason = self._reason or self._obstacle(layout)
        if reason is not None:
            self._note(f"tokens are permuted in each layer: {reason}")
            return
        if self._cache is not None:
            curves[0] = curves[-1] = None
        watched = [curve is not None and block.watched for block, curve in zip(self._blocks, curves, strict=True)]
        if any(watched):
            self._note(f"tokens are permuted in layers of {sum(watched)} blocks: hooks there may read them")
            curves = [None if hidden else curve for hidden, curve in zip(watched, curves, strict=True)]
        self._copies.open()
        for place, (block, curve) in enumerate(zip(self._blocks, curves, strict=True)):
            if curve is not None:
                first = place == 0 or curves[place - 1] != curve
                block.set(self._rows(curve, layout, device), first, curves[place + 1 : place + 2] != [curve])

    def _note(self, note: str) -> None:
        self.notes += [note] if note not in self.notes else []

    def _curve(self, block: ArrangedBlock, last: Decisions) -> Curve | None:
        """The curve of a block whose only self-attention is sparse along one."""
        if len(block.layers) != 1:
            return None
        (layer,) = block.layers
        decision = last.get(layer.kind) if layer.dense_reason is None and layer.left is None else None
        plan = decision[0] if isinstance(decision, tuple) else None
        return plan.curve if isinstance(plan, RoutedPlan) else None

    def _rows(self, curve: Curve, layout: CallLayout, device: torch.device) -> Rows:
        key = curve, layout.grid, device
        if key not in self._rows_along:
            grid = layout.grid if self._with_text else dataclasses.replace(layout.grid, text=0)
            of_this_grid = {other: rows for other, rows in self._rows_along.items() if other[1:] == key[1:]}
            self._rows_along = of_this_grid | {key: rows_along(curve, grid, device)}
        return self._rows_along[key]

    def _obstacle(self, layout: CallLayout) -> str | None:
        """Why this call's tokens cannot be permuted between blocks; None if they can."""
        transformer, cache = self._transformer, self._cache
        theirs = present_cache(transformer) if cache is None else None
        if not self._attached:
            return "the settings have no field order that names a curve"
        if context_parallel.config_of(transformer) is not None:
            return "processes share them"
        if layout.rows is not None:
            return "the sequence is not in the order of its grid"
        if cache is not None and not cache.reads_ends_alone:
            return f"{cache.cache} keeps what is between the ends of the blocks"
        if theirs is not None:
            return f"a step cache that is not the accelerator's ({theirs}) may keep them"
        if any(block.compiled for block in self._blocks):
            return "blocks that are compiled one by one would need graphs for the first, the last and the others"
        return None


def _may_read_tokens(hook: Any) -> bool:
    """Whether a hook may read what a module takes or returns. A hook says that it does not by `reads_tokens`."""
    if isinstance(getattr(hook, "__self__", None), ArrangedBlock):
        return False
    gathers_weights = (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")  # FSDP's
    return not gathers_weights and getattr(hook, "reads_tokens", True)
