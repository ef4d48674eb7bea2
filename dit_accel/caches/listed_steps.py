"""A list of steps at work: which calls compute is known before they begin, so traced code decides nothing.

`ListedCall` decides in the hook before a call and forecasts there; after the call it keeps what the blocks left. Both
are outside of a compiled graph. Hooks on the blocks read its fields: a compiled transformer has one graph for computed
calls and one for skipped ones.

This module imports Diffusers: import it where a cache is put to work.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, ModelHook
from torch import nn

from dit_accel.caches.step_cache import ChosenSteps
from dit_accel.caches.streams import StreamMetadata, Tail


class ListedState(BaseState):
    """What computed calls of one guidance branch have left.

    Attributes:
        step: of the last computed call.
        stored: what it left, by stream that a skipped call makes; empty before the first.
        trends: the change of `stored` a step, since the computed call before; empty without one.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.step = -1
        self.stored: tuple[torch.Tensor, ...] = ()
        self.trends: tuple[torch.Tensor, ...] = ()


class ListedCall:
    """The call under way of a transformer with a list of steps.

    Attributes:
        computes: whether its blocks run.
        answered: the first block has answered for the others. It may not run at all, as in skip-layer guidance.
        answers: of a skipped call, by stream: the residual to add, or the output itself.
        streams: in a computed call what the first block took, in a skipped one what it made.
        left: by a computed call, as `ListedState.stored`.
    """

    def __init__(self, chosen: ChosenSteps) -> None:
        self.replaces = chosen.reuse == "output"
        self._chosen, self._state, self._step = chosen, ListedState(), 0
        self.computes = True
        self._clear()

    def _clear(self) -> None:
        self.answers: tuple[torch.Tensor, ...] = ()
        self.left: tuple[torch.Tensor, ...] = ()
        self.streams: tuple[Any, Any] = (None, None)
        self.answered = False

    def begin(self, state: ListedState, step: int) -> None:
        """Decide the call of a step, in the branch of that state."""
        self.end()
        self._state, self._step = state, step
        self.computes = step in self._chosen.computed or not state.stored
        if self.computes:
            return
        reach = self._chosen.reach(step - state.step)
        if state.trends:
            self.answers = tuple(x + reach * trend for x, trend in zip(state.stored, state.trends, strict=True))
        else:  # the model may write into an output
            self.answers = tuple(x.clone() for x in state.stored) if self.replaces else state.stored

    def end(self) -> None:
        """Keep what a computed call left, and let go of the rest."""
        state, steps = self._state, self._step - self._state.step
        if self.left:
            pairs = zip(self.left, state.stored, strict=True) if state.stored and steps > 0 else ()
            state.trends = tuple((x - before) / steps for x, before in pairs) if self._chosen.damping else ()
            state.stored, state.step = self.left, self._step
        self._clear()


class ListedHook(ModelHook):
    """A hook of a block: its streams, which `residuals.put` sets, and the call under way."""

    _is_stateful = True
    _metadata: StreamMetadata

    def __init__(self, state_manager: Any, call: ListedCall) -> None:
        super().__init__()
        self.state_manager, self._call = state_manager, call

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state_manager.reset()
        return module


class ListedHead(ListedHook):
    """The first block: in a skipped call it makes what the last one returns."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call, streams = self._call, self._metadata.arguments(args, kwargs)
        if call.computes:
            call.streams = streams
            return self.fn_ref.original_forward(*args, **kwargs)
        answers = [x.to(stream.device) for x, stream in zip(call.answers, streams, strict=False)]
        if not call.replaces:
            answers = [stream + x for x, stream in zip(answers, streams, strict=False)]
        call.streams, call.answered = (*answers, streams[1])[:2], True
        return self._metadata.output(*call.streams)


class ListedMiddle(ListedHook):
    """A block between them: in a skipped call it returns what it takes."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._call.answered:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._metadata.output(*self._metadata.arguments(args, kwargs))


class ListedTail(ListedHook):
    """The last block: what it returns, or its difference to what the first one took, is left for skipped calls."""

    def __init__(self, tail: Tail, state_manager: Any, call: ListedCall) -> None:
        super().__init__(state_manager, call)
        self._tail = tail

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call.answered:
            return self._tail.answer(args, kwargs, *call.streams)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if call.streams[0] is not None:
            ends = self._tail.ends(output, call.streams)
            call.left = tuple(end.clone() if call.replaces else end - start for end, start in ends)
        return output
