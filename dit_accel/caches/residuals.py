"""FirstBlockCache and MagCache on any family's stack of blocks: Diffusers' decisions, with our ends of the stack.

Diffusers' hooks of the first and the last block take what the blocks return from their class, and fail or err where

- one class of block serves two lists, or an argument has another name than ``hidden_states``;
- the last blocks see text and image as one sequence (FLUX.2, Chroma), or the last one returns no text (SD3);
- the model adds something between blocks (VACE's control, ControlNets, face adapters): it would count twice;
- the second stream is an output too (sound), which MagCache would leave at the first block's input;
- several processes share the sequence: each would decide by its own part.

This module imports Diffusers: import it where a cache is put to work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, MagCacheConfig
from diffusers.hooks.first_block_cache import (
    _FBC_BLOCK_HOOK,
    _FBC_LEADER_BLOCK_HOOK,
    FBCBlockHook,
    FBCHeadBlockHook,
    FBCSharedBlockState,
)
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import (
    _MAG_CACHE_BLOCK_HOOK,
    _MAG_CACHE_LEADER_BLOCK_HOOK,
    MagCacheBlockHook,
    MagCacheHeadHook,
    MagCacheState,
)
from torch import nn

from dit_accel.caches.listed_steps import ListedCall, ListedHead, ListedMiddle, ListedState, ListedTail
from dit_accel.caches.streams import Tail, describe
from dit_accel.pipelines.stacks import BlockStack

Add = Callable[[torch.Tensor], torch.Tensor]  # sums over the processes that share a sequence
AddNow = Callable[[], Add | None]  # None where one process has it all


class Described:
    """A hook of Diffusers' whose `_metadata` is set by `put`, and not looked up by the block's class."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        return module


class FirstBlockHead(Described, FBCHeadBlockHook):
    """The first block: it always runs, and its residual decides about the others."""

    def __init__(self, state_manager: Any, threshold: float, add_up: AddNow) -> None:
        super().__init__(state_manager, threshold)
        self._add_up = add_up

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = super().new_forward(module, *args, **kwargs)
        state = self.state_manager.get_state()
        state.head_ran = True
        state.answer = None if state.should_compute else self._metadata.returned(output)
        return output

    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: torch.Tensor) -> bool:
        state, add_up = self.state_manager.get_state(), self._add_up()
        if state.tail_block_residuals is None:  # in the first call, and where the last block never runs
            return True
        if add_up is None:
            return bool(super()._should_compute_remaining_blocks(hidden_states_residual))
        before = state.head_block_residual
        sums = [(hidden_states_residual - before).abs().sum(), before.abs().sum()]
        change, size = add_up(torch.stack(sums).double()).tolist()
        return bool(change / size > self.threshold)


class FirstBlockMiddle(Described, FBCBlockHook):
    """A block between them."""


class FirstBlockTail(Described, FBCBlockHook):
    """The last block: what it returns minus what the first one did is the residual of the others."""

    def __init__(self, tail: Tail, state_manager: Any) -> None:
        super().__init__(state_manager, is_tail=True)
        self._tail = tail

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state, tail = self.state_manager.get_state(), self._tail
        if not state.should_compute:
            return tail.answer(args, kwargs, *state.answer)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if not state.head_ran:
            return output
        head = state.head_block_output if isinstance(state.head_block_output, list) else [state.head_block_output, None]
        visual, other = tail.metadata.returned(output)
        stored = tail.visual(visual, head[0].shape[1]) - head[0]
        # the second stream of a joined sequence, or where the last block returns none, is no output
        state.tail_block_residuals = (stored, 0.0 if other is None or head[1] is None else other - head[1])
        return output


class MagHead(Described, MagCacheHeadHook):
    """The first block: in a skipped call it returns its input plus the residual of the last computed call."""

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = super().new_forward(module, *args, **kwargs)
        state = self.state_manager.get_state()
        state.taken, state.head_ran = self._metadata.arguments(args, kwargs), True
        if state.should_compute:
            return output
        visual, second = self._metadata.returned(output)[0], state.taken[1]  # Diffusers has added to the visual stream
        for residual in state.residuals[1:]:
            second = second + residual.to(second.device)
        state.answer = visual, second
        return self._metadata.output(*state.answer)


class MagMiddle(Described, MagCacheBlockHook):
    """A block between them."""


class MagTail(Described, MagCacheBlockHook):
    """The last block: the cache keeps the difference between its output and the first block's input."""

    def __init__(self, tail: Tail, state_manager: Any, config: MagCacheConfig, add_up: AddNow) -> None:
        super().__init__(state_manager, True, config)
        self._tail, self._add_up = tail, add_up

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.state_manager.get_state()
        if not state.should_compute:
            self._advance_step(state)
            return self._tail.answer(args, kwargs, *state.answer)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if state.head_ran:
            state.residuals = [end - start for end, start in self._tail.ends(output, state.taken)]
            if self.config.calibrate:
                self._perform_calibration_step(state, state.residuals[0])
            state.previous_residual = state.residuals[0]
        self._advance_step(state)
        return output

    def _perform_calibration_step(self, state: Any, current_residual: torch.Tensor) -> None:
        super()._perform_calibration_step(state, current_residual)
        add_up, tokens = self._add_up(), current_residual[..., 0].numel()
        if add_up is not None:  # the mean over all processes' tokens
            sums = torch.tensor([state.calibration_ratios[-1] * tokens, tokens], dtype=torch.float64)
            ratios, tokens = add_up(sums.to(current_residual.device)).tolist()
            state.calibration_ratios[-1] = ratios / tokens


def put(
    transformer: nn.Module, stack: BlockStack, config: Any, add_up: AddNow, listed: ListedCall | None = None
) -> None:
    """Put a cache on the blocks of a stack, two or more.

    Args:
        config: of FirstBlockCache or MagCache.
        add_up: as in `CacheAtWork`.
        listed: the calls of a list of steps, which then decides in MagCache's place.
    """
    described = describe(transformer, stack)
    (_, streams), *between, (_, last_streams) = described
    tail = Tail(last_streams, streams.tuple and not last_streams.tuple, stack.image_first, stack.both)
    names = _MAG_CACHE_LEADER_BLOCK_HOOK, _MAG_CACHE_BLOCK_HOOK
    hooks: list[Any]
    if listed is not None:
        states = StateManager(ListedState)
        hooks = [ListedHead(states, listed), *(ListedMiddle(states, listed) for _ in between)]
        hooks.append(ListedTail(tail, states, listed))
    elif isinstance(config, FirstBlockCacheConfig):
        names, states = (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK), StateManager(FBCSharedBlockState)
        hooks = [FirstBlockHead(states, config.threshold, add_up), *(FirstBlockMiddle(states) for _ in between)]
        hooks.append(FirstBlockTail(tail, states))
    else:
        states = StateManager(MagCacheState)
        hooks = [MagHead(states, config), *(MagMiddle(states, config=config) for _ in between)]
        hooks.append(MagTail(tail, states, config, add_up))
    for (block, streams), hook in zip(described, hooks, strict=True):
        hook._metadata = streams
        registry = HookRegistry.check_if_exists_or_initialize(block)
        sharding = registry._hook_order if hook in (hooks[0], hooks[-1]) else ()
        shards = {name: registry.get_hook(name) for name in sharding if name.startswith("cp_")}
        for name in shards:
            registry.remove_hook(name, recurse=False)
        registry.register_hook(hook, names[hook is not hooks[0]])
        for name, shard in shards.items():  # outside ours, which then sees this process's share alone
            registry.register_hook(shard, name)
