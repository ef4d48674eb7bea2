"""The declared measurements of operators on the shapes of models.

Shapes are found in `dit_accel.bench.shapes`, methods in the registry. A method's own file declares how it reaches a
density, and which densities it cannot reach.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.method import Method
from dit_accel.registry import declared, did_you_mean, get_method, get_methods
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid

DIRECTIONS = ("forward", "backward", "both")
DTYPES = ("float32", "bfloat16", "float16")
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
TOLERANCE = 0.2  # relative distance of a row's density from the wanted one

Axes = tuple[int, int, int]


class OutOfReach(DitAccelError):
    """The method cannot keep so small a share of the pairs on this grid."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a row measures: a setting, or the one of a method that is nearest to a density.

    Args:
        density: share of the pairs to keep; None if only `setting` is given.
        setting: None: the one nearest to `density`.
    """

    method: str
    density: float | None = None
    setting: Setting | None = None

    @classmethod
    def of(cls, method: str, density: float | None = None, **config: Any) -> Target:
        """A target with the setting that these settings of a method make; without any, its defaults."""
        return cls(method, density, Setting.make(method, config))

    @property
    def title(self) -> str:
        """The target as typed: ``gna:window=8x16x16``."""
        return self.method if self.setting is None else self.setting.title

    def setting_on(self, grid: TokenGrid) -> Setting:
        """The given setting, or the one for the density.

        Raises:
            OutOfReach: the nearest density on the grid is off by more than a fifth.
            DitAccelError: the method has no rule that finds settings for a density.
        """
        if self.setting is not None:
            return self.setting
        assert self.density is not None
        find = get_method(self.method).at_density
        if find is None:
            raise DitAccelError(
                f"{self.method} has no rule that finds settings for a density. Give settings, as in --method "
                f"{self.method}:KEY=VALUE."
            )
        setting = Setting.make(self.method, find(grid, self.density))
        density = setting.plan(grid).density
        if density is not None and abs(density - self.density) > TOLERANCE * self.density:
            raise OutOfReach(
                f"{self.method} on {grid} reaches no density closer to {self.density:g} than {density:.3f}"
            )
        return setting


@dataclasses.dataclass(frozen=True)
class Shape:
    """The attention of one model at one size.

    Args:
        axes: frames, rows and columns of the visual tokens.
        text, text_first: text tokens in the sequence, and whether they precede the visual ones.
        targets, dtypes, directions: declared for this shape. Without targets: every method that leaves something out
            on it, at every density of `DENSITIES`.
        devices: types of devices on which it is measured without being named.
    """

    name: str
    axes: Axes
    heads: int
    head_dim: int = 128
    text: int = 0
    text_first: bool = False
    targets: tuple[Target, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16",)
    directions: tuple[str, ...] = DIRECTIONS
    devices: tuple[str, ...] = ("cuda",)

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(*self.axes, text=self.text, text_first=self.text_first)

    @property
    def tokens(self) -> int:
        return self.grid.tokens

    def methods(self) -> list[Method]:
        """The methods that find settings for a density and leave something out here."""
        rules = [method for method in get_methods().values() if method.at_density is not None]
        return [method for method in rules if method.sparsest(self.grid) < 1]

    def declared(self) -> tuple[Target, ...]:
        """What is measured if nothing is given."""
        return self.targets or tuple(
            Target(method.name, density)
            for method, density in itertools.product(self.methods(), DENSITIES)
            if self.grid.visual_share(density * (1 + TOLERANCE)) >= method.sparsest(self.grid)
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement of an operator."""

    shape: Shape
    target: Target
    dtype: str
    direction: str

    @property
    def name(self) -> str:
        """``SHAPE/METHOD/DENSITY/DTYPE/DIRECTION``, with ``-`` for settings without density."""
        density = "-" if self.target.density is None else f"{self.target.density:g}"
        return "/".join((self.shape.name, self.target.title, density, self.dtype, self.direction))

    def as_dict(self) -> dict[str, Any]:
        """The declaration as plain values."""
        setting = self.target.setting
        return {
            "row": self.name,
            "op": self.target.method,
            "shape": self.shape.name,
            "tokens": self.shape.tokens,
            "heads": self.shape.heads,
            "head_dim": self.shape.head_dim,
            "density": self.target.density,
            "config": None if setting is None else setting.as_dict()["config"],
            "dtype": self.dtype,
            "direction": self.direction,
        }


def get_shapes() -> dict[str, Shape]:
    """Every declared shape by name, file by file."""
    return {shape.name: shape for shape in itertools.chain(*declared("bench.shapes", "SHAPES"))}


def get_shape(name: str) -> Shape:
    """The declared shape of that name; an error suggests the nearest one."""
    known = get_shapes()
    if name not in known:
        raise DitAccelError(f"Unknown shape {name!r}.{did_you_mean(name, known)} Shapes: {', '.join(known)}.")
    return known[name]


def select(
    shapes: Sequence[str] = (),
    targets: Sequence[Target] = (),
    densities: Sequence[float] = (),
    dtypes: Sequence[str] = (),
    directions: Sequence[str] = (),
    pattern: str = "*",
    device: str | None = None,
) -> list[Row]:
    """Selected rows of operators, declared or new.

    Args:
        shapes: names; none: all.
        targets: methods with or without settings; none, as for the next three: those declared for the shape.
        densities, dtypes, directions: of the rows.
        pattern: of row names, with the wildcards of a shell.
        device: type of the device; shapes declared for others are left out. None: keeps them.

    Raises:
        DitAccelError: a shape, dtype or direction is unknown, a density is not in (0, 1], or no row is left.
    """
    check_known("dtype", dtypes, DTYPES)
    check_known("direction", directions, DIRECTIONS)
    check_densities(densities)
    chosen = map(get_shape, shapes or get_shapes())
    rows = [
        Row(shape, target, dtype, direction)
        for shape in chosen
        if device is None or device in shape.devices
        for target in _targets(shape, targets, densities)
        for dtype in dtypes or shape.dtypes
        for direction in directions or shape.directions
    ]
    matching = [row for row in rows if fnmatch.fnmatchcase(row.name, pattern)]
    if not matching:
        example = f", for example {rows[0].name}" if rows else ""
        raise DitAccelError(
            f"No declared row matches {pattern!r}. Rows are named SHAPE/METHOD/DENSITY/DTYPE/DIRECTION{example}; "
            "--list shows them."
        )
    return matching


def _targets(shape: Shape, targets: Sequence[Target], densities: Sequence[float]) -> Iterator[Target]:
    declared = shape.declared()
    open_ended = [target for target in targets if target.setting is None] if targets else declared
    for method in dict.fromkeys(target.method for target in open_ended):
        usual = dict.fromkeys(target.density for target in declared if target.method == method)
        for density in densities or usual or DENSITIES:
            matching = [target for target in declared if (target.method, target.density) == (method, density)]
            yield from matching or [Target(method, density)]
    yield from (target for target in targets if target.setting is not None)


def check_known(kind: str, names: Iterable[str] | None, known: Sequence[str]) -> None:
    """Refuse names that are not known."""
    for name in names or ():
        if name not in known:
            raise DitAccelError(f"A {kind} is one of {', '.join(known)}; got {name!r}.")


def check_densities(densities: Iterable[float] | None) -> None:
    """Refuse densities outside of (0, 1]."""
    for density in densities or ():
        if not 0 < density <= 1:
            raise DitAccelError(f"A density is a share of the pairs above 0 and at most 1, such as 0.1; got {density}.")
