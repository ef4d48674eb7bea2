"""The token grid of one transformer call, which all methods read."""

from __future__ import annotations

import dataclasses

import torch

from dit_accel.errors import DitAccelError

MOST_TOKENS = 2**31 - 1  # kernels number tokens in 32 bits


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """The layout of one attention sequence: a grid of visual tokens, with text and conditioning tokens around it.

    Visual tokens are in raster order (frame, row, column). Model order is ``[text | visual | conditioning]`` if
    `text_first`, else ``[visual | conditioning | text]``.

    Args:
        frames, height, width: size of the visual grid in tokens; an image has one frame.
        text: text tokens in the sequence, padding included.
        text_first: whether text stands before the visual tokens.
        conditioning: conditioning tokens behind the visual ones; they attend to everything and everything to them.

    Raises:
        DitAccelError: a size is no integer, an axis is empty, a count is negative, or the tokens exceed 32 bits.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = False
    conditioning: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text", 0), ("conditioning", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DitAccelError(f"TokenGrid needs {name} as an integer >= {least}, got {value!r}.")
        if self.tokens > MOST_TOKENS:
            raise DitAccelError(f"TokenGrid takes at most {MOST_TOKENS:,} tokens, got {self.tokens:,}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def visual(self) -> int:
        """Number of visual tokens."""
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.visual + self.conditioning + self.text

    @property
    def visual_start(self) -> int:
        return self.text if self.text_first else 0

    @property
    def visual_rows(self) -> slice:
        """Where the visual tokens are in the sequence."""
        return slice(self.visual_start, self.visual_start + self.visual)

    @property
    def conditioning_start(self) -> int:
        return self.visual_start + self.visual

    @property
    def text_start(self) -> int:
        return 0 if self.text_first else self.visual + self.conditioning

    @property
    def dense_pairs(self) -> int:
        """Pairs with a text or conditioning token, which every method attends."""
        return self.tokens**2 - self.visual**2

    def visual_share(self, density: float) -> float:
        """The share of visual pairs that a mask keeps if its density over all pairs is `density`."""
        return (density * self.tokens**2 - self.dense_pairs) / self.visual**2

    def coordinates(self) -> torch.Tensor:
        """Frame, row and column of every visual token in raster order: int64 [visual, 3]."""
        axes = [torch.arange(length) for length in self.shape]
        return torch.cartesian_prod(*axes).reshape(self.visual, 3)

    def __str__(self) -> str:
        parts = [f"{self.frames}x{self.height}x{self.width}"]
        if self.conditioning:
            parts.append(f"{self.conditioning} conditioning")
        if self.text:
            parts.append(f"{self.text} text {'first' if self.text_first else 'last'}")
        return " + ".join(parts)
