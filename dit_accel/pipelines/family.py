"""What the library has to know of a model family: where its self-attention is, and where the tokens lie in a call."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of one transformer call lie.

    Args:
        grid: the sequence that self-attention sees.
        text_lens: int [B], valid text tokens of each sample, where the model masks the others; the attention mask that
            the model passes is then taken to say the same. None: the model passes no mask.
        notes: what a reader of the report should know, such as tokens that stay dense.
    """

    grid: TokenGrid
    text_lens: torch.Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preset:
    """Recommended settings of one method for a family.

    Args:
        config: settings of the method.
        schedule: arguments of `Schedule`.
        source: where they come from.
    """

    config: Mapping[str, Any]
    schedule: Mapping[str, Any]
    source: str


class Call:
    """One call of a transformer: its arguments by name, and a memory for what was read from small tensors.

    Args:
        signature: of the class's `forward`, with `self`.
        module, args, kwargs: as a forward pre-hook gets them.
        memory: kept by the caller from call to call.
    """

    def __init__(
        self,
        signature: inspect.Signature,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        memory: Memory,
    ) -> None:
        self._owner = type(module).__name__
        self._arguments = signature.bind_partial(module, *args, **kwargs).arguments
        self._memory = memory

    def get(self, name: str) -> Any:
        """The argument, or None if it was not given."""
        return self._arguments.get(name)

    def tensor(self, name: str, dims: int) -> torch.Tensor:
        """The argument as a tensor of that many dimensions.

        Raises:
            DitAccelError: it is missing or shaped otherwise.
        """
        value = self.get(name)
        if not isinstance(value, torch.Tensor) or value.ndim != dims:
            came = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise DitAccelError(f"{self._owner} needs {name} as a tensor of {dims} dimensions, got {came}.")
        return value

    @property
    def device(self) -> torch.device:
        """Where the call's first tensor lies."""
        return next(value for value in self._arguments.values() if isinstance(value, torch.Tensor)).device

    def once(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
        """`read(tensor)` on a CPU copy, worked out once for a tensor that comes again in every step.

        Copying to the CPU waits for the device, so it happens when the tensor is new or was written to.
        """
        return self._memory.recall(tensor, read)


class Memory:
    """Results of reading tensors, kept while the same tensor object, unmodified, comes again."""

    def __init__(self) -> None:
        self._known: dict[Callable[[torch.Tensor], Any], tuple[weakref.ref[torch.Tensor], int, Any]] = {}

    def recall(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
        version = 0 if tensor.is_inference() else tensor._version
        known = self._known.get(read)
        if known is not None and known[0]() is tensor and known[1] == version and not tensor.is_inference():
            return known[2]
        result = read(tensor.detach().cpu())
        self._known[read] = (weakref.ref(tensor), version, result)
        return result


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of Diffusers transformers that share a layout.

    Args:
        name: lower case, the name of its file.
        transformers: class names.
        attention: dotted paths of the self-attention modules in the order they run; ``*`` stands for one name.
        layout: tells where the tokens of a call lie.
        summary: one line for people.
        timestep_scale: what the transformer's `timestep` is multiplied by to be in the scheduler's units.
        recommended: settings by method.
    """

    name: str
    transformers: tuple[str, ...]
    attention: tuple[str, ...]
    layout: Callable[[nn.Module, Call], Layout]
    summary: str
    timestep_scale: float = 1.0
    recommended: Mapping[str, Preset] = dataclasses.field(default_factory=dict)

    def attentions(self, transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Self-attention modules by name, in the order they run."""
        modules = list(transformer.named_modules())
        for path in self.attention:
            wanted = path.split(".")
            for name, module in modules:
                parts = [part for part in name.split(".") if part != "_orig_mod"]
                if len(parts) == len(wanted) and all(map(_fits, wanted, parts)):
                    yield name, module

    @staticmethod
    def head_dim(attention: nn.Module) -> int:
        """Channels of one head of an attention module."""
        return int(attention.inner_dim) // int(attention.heads)  # type: ignore[arg-type]

    def timestep(self, call: Call) -> torch.Tensor | None:
        """The call's timestep in the scheduler's units."""
        value = call.get("timestep")
        return None if value is None else value * self.timestep_scale


def _fits(wanted: str, part: str) -> bool:
    return wanted in ("*", part)


def patch_grid(sizes: tuple[int, int, int], patch: tuple[int, int, int]) -> TokenGrid:
    """The grid of a latent video of these sizes (frames, height, width), cut into patches; remainders are cut off.

    Raises:
        DitAccelError: the latent is smaller than a patch.
    """
    frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
    if min(frames, height, width) < 1:
        raise DitAccelError(f"A latent of {sizes} (frames, height, width) is smaller than the model's patch {patch}.")
    return TokenGrid(frames, height, width)


def image_grids(ids: torch.Tensor) -> tuple[int, int, int, int]:
    """Read a packed image sequence from its position ids.

    Args:
        ids: [N, 3 or more] on the CPU, of each token (..., image, row, column) in its last three columns. Tokens of one
            image follow each other in raster order. The first image is the one that is made.

    Returns:
        Images in front that share the first one's size, height, width, and the number of tokens behind them.

    Raises:
        DitAccelError: the first image is not a raster.
    """
    bounds = torch.nonzero((ids[1:, :-2] != ids[:-1, :-2]).any(-1)).flatten() + 1
    pieces = torch.tensor_split(ids[:, -2:], bounds)
    sizes = [_raster(piece) for piece in pieces]
    if sizes[0] is None:
        raise DitAccelError(
            f"The first {len(pieces[0])} image ids are not a full grid of rows and columns in raster order, so nobody "
            "knows which tokens are neighbours; pass img_ids as the pipeline makes them."
        )
    frames = 0
    while frames < len(sizes) and sizes[frames] == sizes[0]:
        frames += 1
    height, width = sizes[0]
    return frames, height, width, len(ids) - frames * height * width


def _raster(positions: torch.Tensor) -> tuple[int, int] | None:
    """Height and width of tokens at consecutive rows and columns, positions [n, 2]; None if they are no raster."""
    start = positions[0]
    width = int((positions[:, 0] == start[0]).sum())
    height, rest = divmod(len(positions), width)
    token = torch.arange(len(positions))
    expected = torch.stack((token // width, token % width), -1) + start.double()
    # Ids have the model's dtype; bfloat16 rounds positions above 256, so the expected ones are rounded too.
    return (height, width) if rest == 0 and torch.equal(positions, expected.to(positions.dtype)) else None
