"""From a model's JSON configuration to the sizes it can make and the token grid of each."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.generation.sources import EMBEDDED, Source
from dit_accel.tokens import TokenGrid

if TYPE_CHECKING:
    from dit_accel.pipelines.family import Family

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model makes of frames and pixels.

    Args:
        pixels: height and width of a token in pixels; sides are multiples of these.
        frames_step: frames per token after the first, which stands alone; None for a model of images.
        height, width, frames: what the model makes when not asked otherwise.
        text: text tokens in the sequence of self-attention.
        text_first: whether they stand before the visual tokens.
        longest: most tokens along one axis, or None where there is no limit.
    """

    pixels: tuple[int, int]
    frames_step: int | None
    height: int
    width: int
    frames: int = 1
    text: int = 0
    text_first: bool = False
    longest: int | None = None

    @property
    def video(self) -> bool:
        return self.frames_step is not None

    def chosen(self, frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Frames, height and width as asked, or the model's own where not asked.

        Raises:
            DitAccelError: the pipeline cannot make that size (Diffusers would round it silently).
        """
        frames = self.frames if frames is None else frames
        height = self.height if height is None else height
        width = self.width if width is None else width
        for option, value, multiple in (("--height", height, self.pixels[0]), ("--width", width, self.pixels[1])):
            if value % multiple:
                raise DitAccelError(
                    f"{option} {value} cannot be made: this model makes multiples of {multiple}; "
                    f"the nearest {_nearest(value, multiple)}."
                )
        if self.frames_step is None:
            if frames != 1:
                raise DitAccelError(f"--frames {frames} cannot be made: this model makes images; leave --frames out.")
        elif (frames - 1) % self.frames_step:
            raise DitAccelError(
                f"--frames {frames} cannot be made: this model makes 1 frame and then steps of {self.frames_step}; "
                f"the nearest {_nearest(frames, self.frames_step, first=1)}."
            )
        for option, tokens in zip(
            ("--frames", "--height", "--width"), self._tokens(frames, height, width), strict=True
        ):
            if self.longest is not None and tokens > self.longest:
                raise DitAccelError(
                    f"{option} is too large: it makes {tokens} tokens along that axis, and this model has positions "
                    f"for {self.longest}."
                )
        return frames, height, width

    def grid(self, frames: int, height: int, width: int) -> TokenGrid:
        """The token grid of a size that `chosen` accepted."""
        return TokenGrid(*self._tokens(frames, height, width), text=self.text, text_first=self.text_first)

    def _tokens(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        steps = 0 if self.frames_step is None else (frames - 1) // self.frames_step
        return steps + 1, height // self.pixels[0], width // self.pixels[1]


def _nearest(value: int, step: int, first: int = 0) -> str:
    below = (value - first) // step * step + first
    above = below + step
    return f"are {below} and {above}" if below > 0 else f"is {above}"


def _wan(transformer: Config, vae: Config) -> Sizes:
    patch = transformer.get("patch_size", [1, 2, 2])
    pixels = vae.get("scale_factor_spatial", 8)
    return Sizes(
        pixels=(pixels * patch[1], pixels * patch[2]),
        frames_step=vae.get("scale_factor_temporal", 4) * patch[0],
        height=480,
        width=832,
        frames=81,
        longest=transformer.get("rope_max_seq_len", 1024),
    )


def _flux(transformer: Config, vae: Config) -> Sizes:
    pixels = 2 * 2 ** (len(vae["block_out_channels"]) - 1)
    return Sizes(pixels=(pixels, pixels), frames_step=None, height=1024, width=1024, text=512, text_first=True)


# By the class of the transformer. The heights and widths are the defaults of Diffusers' pipelines.
READERS: dict[str, Callable[[Config, Config], Sizes]] = {
    "WanTransformer3DModel": _wan,
    "FluxTransformer2DModel": _flux,
}


def family_of(source: Source) -> Family:
    """The family of a model's transformer; no weights are read.

    Raises:
        DitAccelError: it has no transformer, or one of no supported family.
    """
    from dit_accel import registry

    name = source.component_class("transformer")
    if name is None:
        raise DitAccelError(f"{source.model} has no transformer; only diffusion transformers can be accelerated.")
    for family in registry.get_families().values():
        if name in family.transformers:
            return family
    raise DitAccelError(
        f"{source.model} has a {name}, which no supported family has; "
        f"supported families: {', '.join(registry.list_families())}."
    )


def sizes_of(source: Source) -> Sizes:
    """What a model's configuration says of its sizes; no weights are read.

    Raises:
        DitAccelError: the transformer's family is not supported, its sizes are not known here, or a configuration file
            is missing.
    """
    family, name = family_of(source), source.component_class("transformer")
    if name not in READERS:
        raise DitAccelError(
            f"The command line does not know the sizes that a {name} makes; accelerate {family.name} models in Python."
        )
    sizes = READERS[name](source.config("transformer"), source.config("vae"))
    if source.model in EMBEDDED:
        from dit_accel.pipelines import demo

        own = demo.DEFAULTS
        sizes = dataclasses.replace(sizes, frames=own.num_frames, height=own.height, width=own.width)
    return sizes


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The arguments a pipeline's call takes, by name."""
    return dict(inspect.signature(type(pipe).__call__).parameters)
