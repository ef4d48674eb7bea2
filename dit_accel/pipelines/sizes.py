"""The sizes a model can make, in frames and pixels, and the token grid of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.tokens import TokenGrid

Config = Mapping[str, Any]
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model makes of frames and pixels.

    Args:
        pixels: height and width of a token in pixels; sides are multiples of these.
        frames_step: frames per token; None for a model of images.
        height, width, frames: what the model makes when not asked otherwise.
        text: text tokens in the sequence of self-attention; the maximum, where the prompt decides. A function of the
            grid's shape where that decides.
        text_first: whether text precedes the visual tokens.
        longest: most tokens along one axis; None: no limit.
        frames_first: frames of the first token along time: 1 where a single frame comes first, 0 where every token
            holds `frames_step` frames.
        tokens_step, tokens_first: tokens along time of `frames_step` frames and of `frames_first` frames.
        multiple: the pipeline also wants height and width to be multiples of this.
        conditioning: number of conditioning tokens for a grid shape; None: there are none.
        fps: frames a second of a video, where the call has no argument for it; by default those of Wan's training.
    """

    pixels: tuple[int, int]
    frames_step: int | None
    height: int
    width: int
    frames: int = 1
    text: int | Callable[[Shape], int] = 0
    text_first: bool = False
    longest: int | None = None
    frames_first: int = 1
    tokens_step: int = 1
    tokens_first: int = 1
    multiple: int = 1
    conditioning: Callable[[Shape], int] | None = None
    fps: int = 16

    @property
    def video(self) -> bool:
        return self.frames_step is not None

    def chosen(self, frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Frames, height and width; the model's own value replaces None.

        Raises:
            DitAccelError: the pipeline cannot make that size (Diffusers would round it silently).
        """
        frames = self.frames if frames is None else frames
        height = self.height if height is None else height
        width = self.width if width is None else width
        for option, value, pixels in (("height", height, self.pixels[0]), ("width", width, self.pixels[1])):
            multiple = math.lcm(pixels, self.multiple)
            if value % multiple:
                raise DitAccelError(
                    f"{option} {value} cannot be made: this model makes multiples of {multiple}; "
                    f"the nearest {_nearest(value, multiple)}."
                )
        if self.frames_step is None:
            if frames != 1:
                raise DitAccelError(f"frames {frames} cannot be made: this model makes images, so leave frames out.")
        elif (frames - self.frames_first) % self.frames_step:
            frame = "frame" if self.frames_first == 1 else "frames"
            first = f"{self.frames_first} {frame} and then " if self.frames_first else ""
            raise DitAccelError(
                f"frames {frames} cannot be made: this model makes {first}steps of {self.frames_step}; "
                f"the nearest {_nearest(frames, self.frames_step, first=self.frames_first)}."
            )
        for option, tokens in zip(("frames", "height", "width"), self._tokens(frames, height, width), strict=True):
            if self.longest is not None and tokens > self.longest:
                raise DitAccelError(
                    f"{option} is too large: it makes {tokens} tokens along that axis, and this model has positions "
                    f"for {self.longest}."
                )
        return frames, height, width

    def grid(self, frames: int, height: int, width: int) -> TokenGrid:
        """The token grid of a size that `chosen` accepted."""
        shape = self._tokens(frames, height, width)
        conditioning = 0 if self.conditioning is None else self.conditioning(shape)
        text = self.text if isinstance(self.text, int) else self.text(shape)
        return TokenGrid(*shape, text=text, text_first=self.text_first, conditioning=conditioning)

    def _tokens(self, frames: int, height: int, width: int) -> Shape:
        if self.frames_step is None:
            steps = 1
        else:
            first = self.tokens_first if self.frames_first else 0
            steps = (frames - self.frames_first) // self.frames_step * self.tokens_step + first
        return steps, height // self.pixels[0], width // self.pixels[1]


def _nearest(value: int, step: int, first: int = 0) -> str:
    below = (value - first) // step * step + first
    above = below + step
    return f"are {below} and {above}" if below > 0 else f"is {above}"


def vae_pixels(vae: Config) -> int:
    """Pixels a side of one latent, from whichever of these settings the VAE has."""
    for key in ("scale_factor_spatial", "spatial_compression_ratio"):
        if vae.get(key):
            return int(vae[key])
    if "spatio_temporal_scaling" in vae:
        return int(vae["patch_size"] * 2 ** sum(vae["spatio_temporal_scaling"]))
    if "temperal_downsample" in vae:
        return int(2 ** len(vae["temperal_downsample"]))
    channels = vae["encoder_block_out_channels" if "encoder_block_out_channels" in vae else "block_out_channels"]
    return int(2 ** (len(channels) - 1))


def vae_frames(vae: Config) -> int:
    """Frames of one latent, from whichever of these settings the VAE has."""
    for key in ("scale_factor_temporal", "temporal_compression_ratio"):
        if vae.get(key):
            return int(vae[key])
    if "spatio_temporal_scaling" in vae:
        return int(vae["patch_size_t"] * 2 ** sum(vae["spatio_temporal_scaling"]))
    return int(2 ** sum(vae["temperal_downsample"]))


def patch_of(config: Config) -> Shape:
    """Latent frames, rows and columns of one token, from a transformer's configuration."""
    patch = config["patch_size"]
    return (config.get("patch_size_t") or 1, patch, patch) if isinstance(patch, int) else tuple(patch)


def image_sizes(pixels: int, side: int = 1024, **rest: Any) -> Sizes:
    """Sizes of an image model: a token is a square of `pixels` pixels a side, the default image one of `side`."""
    return Sizes(pixels=(pixels, pixels), frames_step=None, height=side, width=side, **rest)


def square_sizes(transformer: Config, vae: Config, **rest: Any) -> Sizes:
    """Sizes of an image model whose default image is `sample_size` latents a side; `rest` are fields of `Sizes`."""
    pixels = vae_pixels(vae)
    return image_sizes(pixels * transformer["patch_size"], transformer["sample_size"] * pixels, **rest)


def video_sizes(vae: Config, patch: Sequence[int], frames: int, height: int, width: int, **rest: Any) -> Sizes:
    """Sizes of a video model, from its VAE's strides, its patch (frames, height, width) and its default size."""
    pixels = vae_pixels(vae)
    step = vae_frames(vae) * patch[0]
    return Sizes((pixels * patch[1], pixels * patch[2]), step, height, width, frames, **rest)


def patched_sizes(side: int = 1024, **rest: Any) -> Callable[[Config, Config], Sizes]:
    """`Family.sizes` of an image model whose token is `patch_size` latents a side; `rest` are fields of `Sizes`."""
    return lambda transformer, vae: image_sizes(vae_pixels(vae) * patch_of(transformer)[-1], side, **rest)


def packed_sizes(text: int, text_first: bool = True) -> Callable[[Config, Config], Sizes]:
    """`Family.sizes` of an image model that packs 2 x 2 latents into one token."""
    return lambda transformer, vae: image_sizes(2 * vae_pixels(vae), text=text, text_first=text_first)
