"""Which blocks of a transformer a step cache may skip, and what they return. Every family declares its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import nn

from dit_accel.pipelines.sharding import Axes

Streams = tuple[str, ...]  # names of arguments of a block, in the order in which it returns their new values

VISUAL: Streams = ("hidden_states",)
VISUAL_FIRST: Streams = ("hidden_states", "encoder_hidden_states")
TEXT_FIRST: Streams = ("encoder_hidden_states", "hidden_states")


@dataclasses.dataclass(frozen=True)
class BlockStack:
    """The blocks of a transformer that run one after the other on the same tokens.

    Args:
        lists: by name of a list of blocks, in the order they run: what its blocks return. One stream is returned as a
            tensor, two as a tuple. A list of one stream behind one of two sees text and image as one sequence.
        outputs: paths of the modules that make the transformer's outputs; ``*`` matches one name.
        visual: the stream of the image or video.
        image_first: in the joined sequence the image stands before the text.
        both: the second stream is an output of the transformer too, such as sound.
        last_alone: the last block returns None for the second stream.
        by_token: arguments of the blocks that hold a row for each token, and in which axes, as in `Sharding.inputs`.
            With it, the blocks may get their visual tokens in any order: nothing is added between them. None: they get
            them in the model's order.
        latent: the transformer's hidden_states are a latent video [B, C, T, H, W] whose first channels become its
            output, at noise levels from 0 to 1 (a rectified flow), and nothing is added between the blocks.
    """

    lists: Mapping[str, Streams] = dataclasses.field(default_factory=lambda: {"transformer_blocks": VISUAL})
    _: dataclasses.KW_ONLY
    outputs: tuple[str, ...] = ("proj_out",)
    visual: str = "hidden_states"
    image_first: bool = False
    both: bool = False
    last_alone: bool = False
    by_token: Mapping[str, Axes] | None = None
    latent: bool = False

    def blocks(self, transformer: nn.Module) -> Iterator[tuple[str, nn.Module, Streams]]:
        """Name, module and streams of each block, in the order they run."""
        for name, streams in self.lists.items():
            for index, block in enumerate(getattr(transformer, name, ())):
                yield f"{name}.{index}", block, streams
