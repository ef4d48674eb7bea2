"""What blocks take and return, as Diffusers' cache hooks ask for it.

This module imports Diffusers: import it where a cache is put to work.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata
from torch import nn

from dit_accel.pipelines.stacks import BlockStack, Streams


class StreamMetadata(TransformerBlockMetadata):
    """What a block takes and returns, under the names that it has for them.

    Args:
        block: the block's class.
        streams: as in `BlockStack`.
        visual: which of them is the image's or the video's.
    """

    def __init__(self, block: type[nn.Module], streams: Streams, visual: str) -> None:
        others = [name for name in streams if name != visual]
        self.tuple = len(streams) > 1
        super().__init__(
            return_hidden_states_index=streams.index(visual),
            return_encoder_hidden_states_index=streams.index(others[0]) if others else None,
            hidden_states_argument_name=visual,
            encoder_hidden_states_argument_name=others[0] if others else "encoder_hidden_states",
        )
        self._cls = block
        names = list(inspect.signature(block.forward).parameters)[1:]
        self._cached_parameter_indices = {name: place for place, name in enumerate(names)}  # not found in traced code

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
        if not self.joined:
            return self.metadata.output(visual, other)
        joined, tokens = self.metadata.arguments(args, kwargs)[0], visual.shape[1]
        return torch.cat([visual, joined[:, tokens:]] if self.image_first else [joined[:, :-tokens], visual], 1)

    def ends(self, output: Any, taken: tuple[Any, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """By stream that a skipped call makes: what the last block returns, and what the first one took."""
        visual, other = self.metadata.returned(output)
        pairs = [(self.visual(visual, taken[0].shape[1]), taken[0])]
        return pairs + ([(other, taken[1])] if self.both and other is not None else [])


def describe(transformer: nn.Module, stack: BlockStack) -> list[tuple[nn.Module, StreamMetadata]]:
    """The blocks of a stack with their streams."""
    return [
        (block, StreamMetadata(type(block), streams, stack.visual)) for _, block, streams in stack.blocks(transformer)
    ]
