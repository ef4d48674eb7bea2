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

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK, FBCBlockHook, FBCHeadBlockHook
from diffusers.hooks.mag_cache import (
    _MAG_CACHE_BLOCK_HOOK,
    _MAG_CACHE_LEADER_BLOCK_HOOK,
    MagCacheBlockHook,
    MagCacheHeadHook,
)
from torch import nn

from dit_accel.caches.step_cache import ChosenSteps
from dit_accel.pipelines.stacks import BlockStack, Streams

Add = Callable[[torch.Tensor], torch.Tensor]  # sums over the processes that share a sequence
AddNow = Callable[[], Add | None]  # None where one process has it all


class StreamMetadata(TransformerBlockMetadata):
    """What a block takes and returns, under the names that it has for them.

    Args:
        block: the block's class.
        streams: as in `BlockStack`.
        visual: which of them is the image's or the video's.
    """

    def __init__(self, block: type, streams: Streams, visual: str) -> None:
        others = [name for name in streams if name != visual]
        self.tuple = len(streams) > 1
        super().__init__(
            return_hidden_states_index=streams.index(visual),
            return_encoder_hidden_states_index=streams.index(others[0]) if others else None,
            hidden_states_argument_name=visual,
            encoder_hidden_states_argument_name=others[0] if others else "encoder_hidden_states",
        )
        self._cls = block

    def _get_parameter_from_args_kwargs(self, identifier: str, args: Any = (), kwargs: Any = None) -> Any:
        names = {
            "hidden_states": self.hidden_states_argument_name,
            "encoder_hidden_states": self.encoder_hidden_states_argument_name,
        }
        return super()._get_parameter_from_args_kwargs(names.get(identifier, identifier), args, kwargs)

    def arguments(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The visual stream among a block's arguments, and the other or None."""
        other = self._get_parameter_from_args_kwargs("encoder_hidden_states", args, kwargs) if self.tuple else None
        return self._get_parameter_from_args_kwargs("hidden_states", args, kwargs), other

    def returned(self, output: Any) -> tuple[Any, Any]:
        """The visual stream among what a block returns, and the other or None."""
        if not self.tuple:
            return output, None
        return output[self.return_hidden_states_index], output[self.return_encoder_hidden_states_index]

    def output(self, visual: torch.Tensor, other: torch.Tensor | None) -> Any:
        """What a block returns with these streams."""
        if not self.tuple:
            return visual
        pair = [other, other]
        pair[self.return_hidden_states_index] = visual
        return tuple(pair)


@dataclasses.dataclass(frozen=True)
class Tail:
    """The last block of a stack.

    Args:
        metadata: of the last block.
        joined: it sees text and image as one sequence, and the first block does not.
        image_first, both: as in `BlockStack`.
    """

    metadata: StreamMetadata
    joined: bool
    image_first: bool
    both: bool

    def visual(self, hidden: torch.Tensor, tokens: int) -> torch.Tensor:
        """The image's rows [B, tokens, C] of what the last block returns."""
        if not self.joined:
            return hidden
        return hidden[:, :tokens] if self.image_first else hidden[:, -tokens:]

    def answer(self, args: Any, kwargs: Any, visual: torch.Tensor, other: torch.Tensor | None) -> Any:
        """What the last block returns in a skipped call: what the first one made, without what was added since."""
        if self.joined:
            out = self.metadata.arguments(args, kwargs)[0].clone()
            self.visual(out, visual.shape[1]).copy_(visual)
            return out
        return self.metadata.output(visual, other)


class FirstBlockHead(FBCHeadBlockHook):
    """The first block: it always runs, and its residual decides about the others."""

    def __init__(self, metadata: StreamMetadata, state_manager: Any, threshold: float, add_up: AddNow) -> None:
        super().__init__(state_manager, threshold)
        self._own_metadata, self._add_up = metadata, add_up

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._metadata = self._own_metadata
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = super().new_forward(module, *args, **kwargs)
        state = self.state_manager.get_state()
        state.answer = None if state.should_compute else self._own_metadata.returned(output)
        return output

    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: torch.Tensor) -> bool:
        before = self.state_manager.get_state().head_block_residual
        add_up = self._add_up()
        if add_up is None or before is None:
            return bool(super()._should_compute_remaining_blocks(hidden_states_residual))
        sums = [(hidden_states_residual - before).abs().sum(), before.abs().sum()]
        change, size = add_up(torch.stack(sums).double()).tolist()
        return bool(change / size > self.threshold)


class FirstBlockTail(FBCBlockHook):
    """The last block: what it returns minus what the first one did is the residual of the others."""

    def __init__(self, tail: Tail, state_manager: Any) -> None:
        super().__init__(state_manager, is_tail=True)
        self._tail = tail

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state, tail = self.state_manager.get_state(), self._tail
        if not state.should_compute:
            return tail.answer(args, kwargs, *state.answer)
        output = self.fn_ref.original_forward(*args, **kwargs)
        head = state.head_block_output if isinstance(state.head_block_output, list) else [state.head_block_output, None]
        visual, other = tail.metadata.returned(output)
        stored = tail.visual(visual, head[0].shape[1]) - head[0]
        # the second stream of a joined sequence, or where the last block returns none, is no output
        state.tail_block_residuals = (stored, 0.0 if other is None or head[1] is None else other - head[1])
        return output


class MagHead(MagCacheHeadHook):
    """The first block: in a skipped call it returns its input plus the residual of the last computed call.

    `ChosenSteps` may have it return that call's output instead, and forecast either.
    """

    def __init__(
        self, metadata: StreamMetadata, state_manager: Any, config: MagCacheConfig, chosen: ChosenSteps
    ) -> None:
        super().__init__(state_manager, config)
        self._own_metadata, self._chosen = metadata, chosen

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._metadata = self._own_metadata
        return module

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = super().new_forward(module, *args, **kwargs)
        state = self.state_manager.get_state()
        streams = list(self._own_metadata.arguments(args, kwargs))
        if state.should_compute:
            state.second_input = streams[1]
            return output
        for stream, stored in enumerate(state.stored):
            if state.trends:
                stored = stored + self._chosen.reach(state.step_index - state.computed_step) * state.trends[stream]
            stored = stored.to(streams[stream].device)
            streams[stream] = stored.clone() if self._chosen.reuse == "output" else streams[stream] + stored
        state.answer = streams
        return self._own_metadata.output(*streams)


class MagTail(MagCacheBlockHook):
    """The last block: what it returns, without what the first one took or with it, is kept."""

    def __init__(
        self, tail: Tail, state_manager: Any, config: MagCacheConfig, add_up: AddNow, chosen: ChosenSteps
    ) -> None:
        super().__init__(state_manager, True, config)
        self._tail, self._add_up, self._chosen = tail, add_up, chosen

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        return module

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state, tail = self.state_manager.get_state(), self._tail
        if not state.should_compute:
            self._advance_step(state)
            return tail.answer(args, kwargs, *state.answer)
        output = self.fn_ref.original_forward(*args, **kwargs)
        visual, other = tail.metadata.returned(output)
        pairs = [(tail.visual(visual, state.head_block_input.shape[1]), state.head_block_input)]
        pairs += [(other, state.second_input)] if tail.both and other is not None else []
        stored = tuple(end.clone() if self._chosen.reuse == "output" else end - start for end, start in pairs)
        if self.config.calibrate:
            self._perform_calibration_step(state, stored[0])
        state.trends = self._trends(state, stored)
        state.stored, state.computed_step = stored, state.step_index
        state.previous_residual = stored[0]  # by which Diffusers knows that there is something
        self._advance_step(state)
        return output

    def _trends(self, state: Any, stored: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The change of what is kept, a step, since the computed call before; empty without one."""
        if not self._chosen.damping or state.previous_residual is None:
            return ()
        steps, pairs = state.step_index - state.computed_step, list(zip(stored, state.stored, strict=True))
        if steps < 1 or any(now.shape != before.shape for now, before in pairs):
            return ()
        return tuple((now - before) / steps for now, before in pairs)

    def _perform_calibration_step(self, state: Any, current_residual: torch.Tensor) -> None:
        super()._perform_calibration_step(state, current_residual)
        add_up, tokens = self._add_up(), current_residual[..., 0].numel()
        if add_up is not None:  # the mean over all processes' tokens
            sums = torch.tensor([state.calibration_ratios[-1] * tokens, tokens], dtype=torch.float64)
            ratios, tokens = add_up(sums.to(current_residual.device)).tolist()
            state.calibration_ratios[-1] = ratios / tokens


def put(
    transformer: nn.Module, stack: BlockStack, config: Any, add_up: AddNow, chosen: ChosenSteps | None = None
) -> None:
    """Put FirstBlockCache or MagCache on the blocks of a stack, two or more; `chosen` says what MagCache reuses."""
    blocks = list(stack.blocks(transformer))
    described = [(block, StreamMetadata(type(block), streams, stack.visual)) for _, block, streams in blocks]
    for block, metadata in described:
        if type(block) not in TransformerBlockRegistry._registry:
            TransformerBlockRegistry.register(type(block), metadata)
    stand_in = nn.Module()
    stand_in.blocks = nn.ModuleList([block for block, _ in described])
    first = isinstance(config, FirstBlockCacheConfig)
    (apply_first_block_cache if first else apply_mag_cache)(stand_in, config)
    lead, rest = (
        (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK) if first else (_MAG_CACHE_LEADER_BLOCK_HOOK, _MAG_CACHE_BLOCK_HOOK)
    )
    registries = [HookRegistry.check_if_exists_or_initialize(block) for block, _ in described]
    for registry, (_, metadata) in zip(registries[1:-1], described[1:-1], strict=True):
        registry.get_hook(rest)._metadata = metadata
    taken, returned = described[0][1], described[-1][1]
    tail = Tail(returned, taken.tuple and not returned.tuple, stack.image_first, stack.both)
    states = registries[0].get_hook(lead).state_manager
    if first:
        ours = FirstBlockHead(taken, states, config.threshold, add_up), FirstBlockTail(tail, states)
    else:
        chosen = chosen or ChosenSteps((0, 1))
        ours = MagHead(taken, states, config, chosen), MagTail(tail, states, config, add_up, chosen)
    for registry, name, hook in ((registries[0], lead, ours[0]), (registries[-1], rest, ours[1])):
        registry.remove_hook(name, recurse=False)
        shards = {other: registry.get_hook(other) for other in registry._hook_order if other.startswith("cp_")}
        for other in shards:
            registry.remove_hook(other, recurse=False)
        registry.register_hook(hook, name)
        for other, shard in shards.items():  # outside ours, which then sees this process's share alone
            registry.register_hook(shard, other)
