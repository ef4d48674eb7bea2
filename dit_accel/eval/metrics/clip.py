"""CLIP (Radford et al. 2021): images and texts in one space, and the image tower's features for other metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.errors import DitAccelError
from dit_accel.generation.sources import first_line

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

BATCH = 64  # frames in the image tower at once


@dataclass(frozen=True)
class Preparation:
    """How frames become the image tower's input; the words of a ``preprocessor_config.json``."""

    shortest_edge: int | None  # scale the shorter side to this, or
    size: tuple[int, int] | None  # both sides, height and width, to these
    crop: tuple[int, int] | None  # then cut this much out of the middle
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, frames: Tensor) -> Tensor:
        """Float [N, 3, H, W] in [0, 1] to [N, 3, h, w], normalised."""
        height, width = frames.shape[-2:]
        if self.size:
            target = self.size
        else:
            factor = (self.shortest_edge or min(height, width)) / min(height, width)
            target = (int(height * factor), int(width * factor))
        if target != (height, width):
            frames = functional.interpolate(frames, target, mode="bicubic", antialias=True).clamp(0, 1)
        if self.crop:
            top, left = ((have - want) // 2 for have, want in zip(target, self.crop, strict=True))
            frames = frames[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (frames - mean) / std


class Clip:
    """A `transformers` CLIP model with its tokenizer and preparation, in evaluation mode.

    Attributes:
        name: "demo-clip" for the embedded one, else the last part of the folder or hub id.
        model: the `CLIPModel`.
    """

    def __init__(self, name: str, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, prepare: Preparation) -> None:
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.prepare = prepare

    @classmethod
    def load(
        cls, source: str | Path = "demo", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Clip:
        """Load "demo" (the embedded one), a folder that `save_pretrained` wrote, or a hub id.

        Raises:
            DitAccelError: the source holds no CLIP, or cannot be reached.
        """
        from transformers import AutoConfig, AutoTokenizer, CLIPModel

        from dit_accel.eval.demo_clip import FOLDER, NAME

        place = str(FOLDER) if source == "demo" else str(source)
        try:
            config = AutoConfig.from_pretrained(place)
            if config.model_type != "clip":
                raise DitAccelError(f"{place} holds a model of type {config.model_type!r}; give one of type 'clip'.")
            model = CLIPModel.from_pretrained(place, dtype=dtype, use_safetensors=True).to(device)
            tokenizer = AutoTokenizer.from_pretrained(place)
            prepare = read_preparation(place)
        except (OSError, ValueError) as error:
            raise DitAccelError(
                f"No CLIP could be loaded from {place}: {first_line(error)} "
                "Give 'demo', a folder in transformers' format, or a hub id."
            ) from error
        return cls(NAME if source == "demo" else place.rstrip("/").rpartition("/")[2], model, tokenizer, prepare)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def images(self, frames: Tensor) -> Tensor:
        """Unit vectors, float32 [N, D], of frames float [N, 3, H, W] in [0, 1]."""
        projected = [self.model.visual_projection(out.pooler_output) for out in self._tower(frames)]
        return functional.normalize(torch.cat(projected).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit vectors, float32 [N, D]; what is longer than the model's context is cut off."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        out = self.model.text_model(**tokens.to(self.device))
        return functional.normalize(self.model.text_projection(out.pooler_output).float(), dim=-1)

    @torch.no_grad()
    def features(self, frames: Tensor) -> Tensor:
        """What the image tower pools before its projection, float32 [N, F]; for FID and KID."""
        return torch.cat([out.pooler_output for out in self._tower(frames)]).float()

    @torch.no_grad()
    def layers(self, frames: Tensor) -> list[Tensor]:
        """The image tower's activations after each of its layers, float32 [N, C, h, w], a place for each patch."""
        batches = [out.hidden_states[1:] for out in self._tower(frames, output_hidden_states=True)]
        return [_as_picture(torch.cat(layer).float()) for layer in zip(*batches, strict=True)]

    def _tower(self, frames: Tensor, **options: Any) -> list[Any]:
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"CLIP takes frames [N, 3, H, W], got {tuple(frames.shape)}.")
        pixels = (self.prepare(part.to(self.device).float()).to(self.model.dtype) for part in frames.split(BATCH))
        return [self.model.vision_model(pixel_values=part, **options) for part in pixels]


def _as_picture(hidden: Tensor) -> Tensor:
    """[N, 1 + h·w, C] with the class token first to [N, C, h, w]; CLIP's pictures are square."""
    side = math.isqrt(hidden.shape[1] - 1)
    return hidden[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def read_preparation(source: str) -> Preparation:
    """The preparation that a folder's or hub id's ``preprocessor_config.json`` describes.

    Its rescaling by 1/255 falls away: our frames are in [0, 1].
    """
    from transformers.image_processing_utils import ImageProcessingMixin

    config, _ = ImageProcessingMixin.get_image_processor_dict(source)
    size = config.get("size", 224)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = config.get("crop_size", 224)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    both = (size["height"], size["width"]) if "height" in size else None
    return Preparation(
        shortest_edge=None if both else size["shortest_edge"],
        size=both,
        crop=(crop["height"], crop["width"]) if config.get("do_center_crop", True) else None,
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
    )
