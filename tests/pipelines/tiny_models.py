"""Small random transformers of the real classes, on which every check of a family runs.

Each file in `models/` is one family's: `MODELS`, a list of `TinyModel`. A new file is found without being named here.
"""

import copy
import dataclasses
import functools
import importlib.util
import pathlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dit_accel.tokens import TokenGrid

FOLDER = pathlib.Path(__file__).parent / "models"


@dataclasses.dataclass(frozen=True, eq=False)
class TinyModel:
    """One transformer and one call of it, at a grid where no size is a multiple of a block.

    Args:
        family: name of its family.
        id: tells it from the family's other models.
        build: makes the transformer in evaluation mode, always with the same weights; see `seeded`.
        inputs: makes the keywords of a forward call of so many samples, always the same numbers, in float32. Samples
            differ, also in the length of their text where the family has lengths.
        grid: what the family has to read from that call.
        text_lens: valid text tokens of two samples; None if the model attends to all its text.
        compiles: "whole" if the stock model compiles as one graph; "blocks" if only `compile_repeated_blocks` does;
            "no" if neither does.
        rows: int64 [2, tokens], as `CallLayout.rows`.
        coarsest: what the stock model rounds to inside, whatever its dtype, so that it does not run in float64;
            `shared_double` is in float32 then, and the attention that it is given is exact alone.
        lengths: tokens of a call of self-attention, the fewest and the most; from `visual` to `tokens` of the grid if
            not given. Keys, where queries are fewer. No other attention in the model (cross-attention, refiners, audio)
            may have as many.
        queries: how many of the tokens are queries, where text is among the keys alone.
    """

    family: str
    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    grid: TokenGrid
    text_lens: tuple[int, ...] | None = None
    compiles: str = "whole"
    rows: torch.Tensor | None = None
    coarsest: torch.dtype | None = None
    lengths: tuple[int, int] | None = None
    queries: int | None = None

    def __str__(self) -> str:
        return f"{self.family}:{self.id}"

    @property
    def doubles(self) -> bool:
        """Whether the stock model runs in float64."""
        return self.coarsest is None

    @property
    def video(self) -> bool:
        return self.grid.frames > 1

    def call(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The keywords of a call, floating-point tensors in `dtype`."""
        return cast(self.inputs(batch), dtype)

    @functools.cached_property
    def shared(self) -> nn.Module:
        """A transformer for tests that leave it as it was."""
        return self.build()

    @functools.cached_property
    def shared_double(self) -> nn.Module:
        return copy.deepcopy(self.build()).double() if self.doubles else self.build()

    def double_call(self) -> dict[str, Any]:
        """The keywords of a call of `shared_double`."""
        return self.call(dtype=torch.float64 if self.doubles else torch.float32)

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        """What the untouched model answers to `call()`."""
        return run(self.build(), self.call())


def seeded(kind: Callable[..., nn.Module], **config: Any) -> nn.Module:
    """A transformer with the same random weights every time; what is drawn after it does not depend on it.

    Parameters that start constant (gates, norms, output layers at zero) get noise too, so that nothing is invisible. So
    do those whose memory the constructor leaves as it was: they are NaN here.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        try:
            transformer = kind(**config).eval()
        finally:
            torch.use_deterministic_algorithms(False)
        for parameter in transformer.parameters():
            if parameter.numel() and not bool(parameter.min() < parameter.max()):
                parameter.nan_to_num_().add_(torch.randn_like(parameter), alpha=0.2)
    return transformer


def numbers(seed: int = 1) -> Callable[..., torch.Tensor]:
    """Makes random tensors of these shapes, the same ones in the same order every time."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def text_mask(lengths: tuple[int, ...], tokens: int, batch: int) -> torch.Tensor:
    """Which text tokens are valid, int64 [batch, tokens], for samples of these lengths in turn."""
    counts = torch.tensor([lengths[sample % len(lengths)] for sample in range(batch)])
    return (torch.arange(tokens) < counts[:, None]).long()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with every floating-point tensor in them in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype) for item in value)
    return value


def run(transformer: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """All outputs of a call, one behind the other."""
    with torch.no_grad():
        outputs = transformer(**inputs, return_dict=False)
    return torch.cat([tensor.flatten() for tensor in _tensors(outputs)])


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


@functools.cache
def module(name: str) -> types.ModuleType:
    """The file of a family, with what it offers besides `MODELS`."""
    spec = importlib.util.spec_from_file_location(f"tiny_models.{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def all_models() -> tuple[TinyModel, ...]:
    """Every model of every file, by family."""
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    return tuple(model for name in names for model in module(name).MODELS)


def get(family: str, id: str) -> TinyModel:
    """One model."""
    return next(model for model in all_models() if (model.family, model.id) == (family, id))
