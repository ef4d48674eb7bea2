"""The networks of metrics: CLIP (Radford et al. 2021), and FID's own Inception."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.errors import DitAccelError, first_line
from dit_accel.pipelines.quiet import quietly

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

# A small `transformers` CLIP trained on the demo's captioned clips, for machines without network: see its README.md.
DEMO_CLIP = "demo-clip"
DEMO_CLIP_FOLDER = Path(__file__).parent / "demo_clip" / "weights"
INCEPTION = "inception"
HUB_CLIP = "openai/clip-vit-base-patch16"
INCEPTION_FEATURES = 2048
BATCH = 64  # frames in a network at once


class Networks:
    """Loads each network once, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loaded: dict[str, Any] = {}

    def features(self, source: str | None) -> Any:
        """A network with `features`: "inception" (if None), a file of its weights, or a CLIP as in `clip`."""
        source = source or INCEPTION
        if not _is_inception(source):
            return self.clip(source)
        if source not in self._loaded:
            self._loaded[source] = Inception(self.device, None if source == INCEPTION else Path(source))
        return self._loaded[source]

    def clip(self, source: str | None) -> Any:
        """A CLIP: "demo-clip", a folder, or a Hub id; Inception, which reads no texts, is refused."""
        source = source or HUB_CLIP
        if _is_inception(source):
            raise DitAccelError(
                f"This metric needs a network that reads texts, and {source} does not. Give {DEMO_CLIP}, a folder or "
                "a Hub id."
            )
        if source not in self._loaded:
            with quietly():
                self._loaded[source] = Clip.load(source, device=self.device)
        return self._loaded[source]


def _is_inception(source: str) -> bool:
    return source == INCEPTION or source.endswith(".pth")


def require_package(metric: str, package: str) -> None:
    """Refuse a package that is missing, with the command that installs it, or that cannot be imported."""
    if not installed((package,)):
        raise DitAccelError(
            f"{metric} needs {package.replace('_', '-')}, which is not installed: "
            f"pip install 'dit_accel[eval-reference]'. Or measure with the embedded {DEMO_CLIP}."
        )
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch raises any of these
        raise DitAccelError(
            f"{metric} needs {package.replace('_', '-')}, which is installed but cannot be loaded "
            f"({first_line(error)}). Install its build for this torch."
        ) from error


def installed(packages: Iterable[str]) -> bool:
    """Whether all of them are installed; none is imported."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


class Clip:
    """A CLIP in evaluation mode; its name is "demo-clip" or the last part of a folder or Hub id."""

    def __init__(
        self, name: str, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, processor: CLIPImageProcessor
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor

    @classmethod
    def load(cls, source: str | Path = DEMO_CLIP, device: str | torch.device = "cpu") -> Clip:
        """Load "demo-clip" (the embedded one), a folder that `save_pretrained` wrote, or a Hub id.

        Raises:
            DitAccelError: the source holds no CLIP, or cannot be reached.
        """
        from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

        place = str(DEMO_CLIP_FOLDER) if source == DEMO_CLIP else str(source)
        try:
            config = AutoConfig.from_pretrained(place)
            if config.model_type != "clip":
                raise DitAccelError(f"{place} holds a model of type {config.model_type!r}. Give one of type 'clip'.")
            model = CLIPModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True).to(device)
            tokenizer = AutoTokenizer.from_pretrained(place)
            processor = CLIPImageProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise DitAccelError(
                f"No CLIP could be loaded from {place}: {first_line(error)} "
                f"Give {DEMO_CLIP}, a folder in transformers' format, or a Hub id."
            ) from error
        return cls(str(source).rstrip("/").rpartition("/")[2], model, tokenizer, processor)

    def prepare(self, frames: Tensor) -> Tensor:
        """Float [N, 3, H, W] in [0, 1] to [N, 3, h, w], resized, cut and normalised by the processor's settings.

        Without torchvision the processor itself rounds to 8 bits before and after it resizes.
        """
        size, crop = self.processor.size, self.processor.crop_size
        height, width = frames.shape[-2:]
        if size.height:
            target = (size.height, size.width)
        else:
            factor = size.shortest_edge / min(height, width)
            target = (int(height * factor), int(width * factor))
        if target != (height, width):
            frames = functional.interpolate(frames, target, mode="bicubic", antialias=True).clamp(0, 1)
        if self.processor.do_center_crop:
            top, left = (target[0] - crop.height) // 2, (target[1] - crop.width) // 2
            frames = frames[..., top : top + crop.height, left : left + crop.width]
        mean, std = (
            torch.tensor(values, device=frames.device).view(3, 1, 1)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return (frames - mean) / std

    @torch.no_grad()
    def images(self, frames: Tensor) -> Tensor:
        """Unit vectors, float32 [N, D], of frames float [N, 3, H, W] in [0, 1]."""
        projected = [self.model.visual_projection(out.pooler_output) for out in self._tower(frames)]
        return functional.normalize(torch.cat(projected).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit vectors, float32 [N, D]; texts are cut off at the model's context."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        out = self.model.text_model(**tokens.to(self.model.device))
        return functional.normalize(self.model.text_projection(out.pooler_output).float(), dim=-1)

    @torch.no_grad()
    def features(self, frames: Tensor) -> Tensor:
        """The image tower's pooled output before its projection, float32 [N, F]; for FID and KID."""
        return torch.cat([out.pooler_output for out in self._tower(frames)]).float()

    @torch.no_grad()
    def layers(self, frames: Tensor) -> list[Tensor]:
        """The image tower's activations behind each of its layers, float32 [N, C, h, w], a place for each patch."""
        batches = [out.hidden_states[1:] for out in self._tower(frames, output_hidden_states=True)]
        layers = [torch.cat(layer).float()[:, 1:] for layer in zip(*batches, strict=True)]  # without the class token
        side = math.isqrt(layers[0].shape[1])  # CLIP's pictures are square
        return [layer.transpose(1, 2).unflatten(2, (side, side)) for layer in layers]

    def _tower(self, frames: Tensor, **options: Any) -> list[Any]:
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"CLIP takes frames [N, 3, H, W], got {tuple(frames.shape)}.")
        pixels = (self.prepare(part.to(self.model.device).float()) for part in frames.split(BATCH))
        return [self.model.vision_model(pixel_values=part, **options) for part in pixels]


class Inception:
    """torch-fidelity's port of FID's Inception v3, from torchmetrics; without local weights it fetches them once.

    Raises:
        DitAccelError: torch-fidelity is missing or cannot be loaded, or the weights cannot be read or fetched.
    """

    name = INCEPTION

    def __init__(self, device: torch.device, weights: Path | None = None) -> None:
        require_package("fid and kid on Inception's features", "torch_fidelity")
        if weights is not None and not weights.is_file():
            raise DitAccelError(f"There is no file {weights} with Inception's weights.")
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = None if weights is None else str(weights)
        try:
            network = NoTrainInceptionV3(
                "inception-v3-compat", [str(INCEPTION_FEATURES)], feature_extractor_weights_path=path
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: a state dict of another model
            raise DitAccelError(
                f"Inception's weights cannot be {'fetched' if weights is None else f'read from {weights}'} "
                f"({first_line(error)}). Give a local file as fid[FILE.pth], or measure fid[demo-clip]."
            ) from error
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """Float32 [N, 2048] of images [N, 3, H, W] in [0, 1]; the network takes them in 8 bits."""
        pixels = (frames * 255).round().to(torch.uint8)
        return torch.cat([self.network(part.to(self.device)).float() for part in pixels.split(BATCH)])
