"""The declared benchmarks: which operator is timed on which shape, at which density, in which dtype and direction.

Nothing here runs or needs torch, so listing what is declared costs nothing.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    from dit_accel.tokens import TokenGrid

DIRECTIONS = ("forward", "backward", "both")
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("radial", "tile", "gna", "sla")
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
TOLERANCE = 0.2  # how far, relatively, a row's density may be from what was asked
OF_FRAMES = ("radial", "tile")  # methods that sparsify over time and keep all of a single frame


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method is asked for.

    Args:
        method: its name.
        density: share of the pairs to keep; None if `config` alone says it.
        config: settings by name; None: those that come nearest to `density` are found.
    """

    method: str
    density: float | None
    config: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """The way it is typed: ``gna:window=8x16x16,stride=1``."""
        settings = ",".join(f"{name}={_typed(value)}" for name, value in (self.config or {}).items())
        return f"{self.method}:{settings}" if settings else self.method


@dataclasses.dataclass(frozen=True)
class Shape:
    """The attention of one model at one size.

    Args:
        name: what rows call it.
        axes: frames, rows and columns of the visual tokens.
        heads, head_dim: of the model.
        text: text tokens in the sequence.
        text_first: whether they stand before the visual ones.
        settings, dtypes, directions: what is declared for this shape; no settings: every method that has something to
            leave out on it, at every density of `DENSITIES`.
    """

    name: str
    axes: tuple[int, int, int]
    heads: int
    head_dim: int = 128
    text: int = 0
    text_first: bool = False
    settings: tuple[Setting, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16",)
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def visual(self) -> int:
        return self.axes[0] * self.axes[1] * self.axes[2]

    @property
    def tokens(self) -> int:
        return self.visual + self.text

    @property
    def grid(self) -> TokenGrid:
        from dit_accel.tokens import TokenGrid

        return TokenGrid(*self.axes, text=self.text, text_first=self.text_first)

    def declared(self) -> tuple[Setting, ...]:
        """The settings that are measured when none are asked for."""
        if self.settings:
            return self.settings
        methods = [method for method in METHODS if self.axes[0] > 1 or method not in OF_FRAMES]
        return tuple(
            Setting(method, density)
            for method, density in itertools.product(methods, DENSITIES)
            if density * (1 + TOLERANCE) >= self.sparsest(method)
        )

    def sparsest(self, method: str) -> float:
        """A density that no setting of the method goes below here.

        Text meets everything. Tile with one reference frame keeps 3T - 2 of T * T pairs of frames, and so does radial,
        whose neighbouring frames see each other whole.
        """
        frames = self.axes[0]
        kept = (3 * frames - 2) / frames**2 if method in OF_FRAMES else 0.0
        visual = (self.visual / self.tokens) ** 2
        return 1 - visual * (1 - kept)


@dataclasses.dataclass(frozen=True)
class Row:
    """One declared measurement."""

    shape: Shape
    setting: Setting
    dtype: str
    direction: str

    @property
    def name(self) -> str:
        """``SHAPE/METHOD/DENSITY/DTYPE/DIRECTION``, with ``-`` where the settings alone say the density."""
        density = "-" if self.setting.density is None else f"{self.setting.density:g}"
        return "/".join((self.shape.name, self.setting.title, density, self.dtype, self.direction))

    def as_dict(self) -> dict[str, Any]:
        """The declaration as plain values."""
        config = self.setting.config
        return {
            "row": self.name,
            "op": self.setting.method,
            "shape": self.shape.name,
            "tokens": self.shape.tokens,
            "heads": self.shape.heads,
            "head_dim": self.shape.head_dim,
            "density": self.setting.density,
            "config": None if config is None else dict(config),
            "dtype": self.dtype,
            "direction": self.direction,
        }


# Small enough for a processor. Its windows are whole blocks; the last gna slides.
CPU = Shape(
    "cpu",
    (8, 32, 32),
    heads=4,
    head_dim=64,
    settings=(
        Setting("gna", 1 / 4, {"window": (8, 16, 16), "stride": (8, 16, 16)}),
        Setting("gna", 1 / 8, {"window": (8, 16, 8), "stride": (8, 16, 8)}),
        Setting("gna", 1 / 16, {"window": (8, 8, 8), "stride": (8, 8, 8)}),
        Setting("gna", 1 / 8, {"window": (4, 16, 16), "stride": 1}),
        *(Setting("sla", density) for density in (1 / 4, 1 / 8, 1 / 16)),
        *(Setting(method, 1 / 2) for method in OF_FRAMES),
    ),
    dtypes=("float32", "bfloat16"),
    directions=("forward", "both"),
)

# Latents in tokens: frames are compressed 4 times (Mochi 6) after the first one, pixels 8 times and then in 2 x 2.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("wan-1.3b-480p", (21, 30, 52), heads=12),
        Shape("wan-14b-480p", (21, 30, 52), heads=40),
        Shape("wan-14b-720p", (21, 45, 80), heads=40),
        Shape("hunyuan-720p", (33, 45, 80), heads=24, text=256),
        Shape("hunyuan-768p", (30, 48, 80), heads=24),  # without text, as GNA's paper measures it (arXiv:2504.16922)
        Shape("mochi", (28, 30, 53), heads=24, text=256),
        Shape("flux-2k", (1, 128, 128), heads=24, text=512, text_first=True),
        Shape("flux-4k", (1, 256, 256), heads=24, text=512, text_first=True),
        Shape("cogvideox", (13, 30, 45), heads=48, head_dim=64, text=226, text_first=True),
        CPU,
    )
}


def select(
    shapes: Sequence[str] | None = None,
    settings: Sequence[Setting] | None = None,
    densities: Sequence[float] | None = None,
    dtypes: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
    pattern: str = "*",
) -> list[Row]:
    """Declared rows, narrowed down; what is asked for beyond the declared (a density, a dtype, settings) is added.

    Args:
        shapes: names; None: all.
        settings: methods, with settings of their own or without; None: those declared for the shape.
        densities: None: those declared for the shape.
        dtypes, directions: None: those declared for the shape.
        pattern: of row names, with the wildcards of a shell.

    Raises:
        DitAccelError: a shape, dtype or direction is unknown, a density is not in (0, 1], or no row is left.
    """
    for kind, names, known in (("dtype", dtypes, DTYPES), ("direction", directions, DIRECTIONS)):
        for name in names or ():
            if name not in known:
                raise DitAccelError(f"A {kind} is one of {', '.join(known)}; got {name!r}.")
    check_densities(densities or ())
    rows = [
        Row(shape, setting, dtype, direction)
        for shape in map(get_shape, SHAPES if shapes is None else shapes)
        for setting in _settings(shape, settings, densities)
        for dtype in dtypes or shape.dtypes
        for direction in directions or shape.directions
    ]
    chosen = [row for row in rows if fnmatch.fnmatchcase(row.name, pattern)]
    if not chosen:
        example = f", for example {rows[0].name}" if rows else ""
        raise DitAccelError(
            f"No declared row matches {pattern!r}. Rows are named SHAPE/METHOD/DENSITY/DTYPE/DIRECTION{example}; "
            "--list shows them."
        )
    return chosen


def check_densities(densities: Sequence[float]) -> None:
    """See that densities are shares.

    Raises:
        DitAccelError: one is not in (0, 1].
    """
    for density in densities:
        if not 0 < density <= 1:
            raise DitAccelError(f"A density is a share of the pairs above 0 and at most 1, such as 0.1; got {density}.")


def get_shape(name: str) -> Shape:
    """The declared shape of that name.

    Raises:
        DitAccelError: there is none; the message suggests the nearest name.
    """
    if name not in SHAPES:
        from dit_accel.registry import did_you_mean

        raise DitAccelError(f"Unknown shape {name!r}.{did_you_mean(name, SHAPES)} Shapes: {', '.join(SHAPES)}.")
    return SHAPES[name]


def _settings(shape: Shape, settings: Sequence[Setting] | None, densities: Sequence[float] | None) -> Iterator[Setting]:
    declared = shape.declared()
    asked = declared if settings is None else [setting for setting in settings if setting.config is None]
    for method in dict.fromkeys(setting.method for setting in asked):
        own = dict.fromkeys(setting.density for setting in declared if setting.method == method)
        for density in densities or own or DENSITIES:
            matching = [setting for setting in declared if (setting.method, setting.density) == (method, density)]
            yield from matching or [Setting(method, density)]
    yield from (setting for setting in settings or () if setting.config is not None)


def _typed(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
