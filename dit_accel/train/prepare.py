"""Makes training data (`data.py`) from captioned media, from the dense model's own samples, or from the demo's clips.

The conditioning of a prompt is read from the pipeline's first transformer call, clean latents from its last step.
This works for text-to-image and text-to-video pipelines that pass their latents unchanged to the transformer. Pipelines
that add other channels (image to video) are refused.
"""

from __future__ import annotations

import contextlib
import inspect
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dit_accel.errors import DitAccelError, first_line
from dit_accel.train.data import Call, TrainingSample

SIZE = ("num_frames", "height", "width")
NOT_CONDITIONING = ("self", "hidden_states", "timestep", "return_dict")


class _Seen(Exception):
    """Stops a pipeline at its first transformer call."""


def find_transformer(pipe: DiffusionPipeline) -> nn.Module:
    """The pipeline's one transformer."""
    if getattr(pipe, "transformer", None) is None:
        raise DitAccelError(f"{type(pipe).__name__} has no transformer to train.")
    if getattr(pipe, "transformer_2", None) is not None:
        raise DitAccelError(
            f"{type(pipe).__name__} has two transformers on one trajectory. Training needs a pipeline with one."
        )
    return pipe.transformer


class Preparer:
    """Makes samples of one size with one pipeline.

    Args:
        pipe: the pipeline, dense.
        size: height, width and, for a video, num_frames of its call; other entries are left out.
        guidance: for models that take guidance as a number (FLUX dev); others are conditioned without guidance.
    """

    def __init__(self, pipe: DiffusionPipeline, size: Mapping[str, Any], guidance: float = 3.5) -> None:
        self.pipe = pipe
        takes = inspect.signature(type(pipe).__call__).parameters
        embedded = getattr(find_transformer(pipe).config, "guidance_embeds", False)
        self.size: dict[str, int] = {name: size[name] for name in SIZE if name in size}
        self._plain = dict[str, float](self.size)
        if "guidance_scale" in takes:
            self._plain["guidance_scale"] = guidance if embedded else 1.0

    def conditioning(self, prompt: str, steps: int = 1) -> tuple[Call, torch.Size]:
        """The conditioning of the pipeline's first transformer call for a prompt, and the shape of its latents.

        The call is without classifier-free guidance, so that there is one row.

        Args:
            steps: of the pipeline's call.

        Raises:
            DitAccelError: the pipeline needs more than a prompt, or calls its transformer with several rows, a timestep
                for each token, or other names of arguments.
        """
        pipe, transformer = self.pipe, find_transformer(self.pipe)
        signature = inspect.signature(type(transformer).forward)
        seen: dict[str, Any] = {}

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.update(signature.bind_partial(module, *args, **kwargs).arguments)
            raise _Seen

        handle = transformer.register_forward_pre_hook(look, with_kwargs=True)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(0)
        try:
            with torch.no_grad(), contextlib.suppress(_Seen):
                pipe(prompt=prompt, generator=generator, num_inference_steps=steps, output_type="latent", **self._plain)
        except (AttributeError, TypeError, ValueError) as error:
            raise DitAccelError(
                f"{type(pipe).__name__} cannot be called with a prompt alone ({first_line(error)}). Training needs a "
                "pipeline of text to image or text to video, and a size that it makes."
            ) from error
        finally:
            handle.remove()
        latents, timestep = (tuple(getattr(seen.get(name), "shape", ())) for name in ("hidden_states", "timestep"))
        if latents[:1] != (1,) or len(timestep) > 1 or not isinstance(seen.get("timestep"), torch.Tensor):
            raise DitAccelError(
                f"{type(pipe).__name__} calls its transformer with hidden_states of shape {latents} and timestep of "
                f"shape {timestep}. Training needs a pipeline that passes one row and one timestep."
            )
        call = {key: seen[key] for key in seen if key not in NOT_CONDITIONING and seen[key] is not None}
        return call, seen["hidden_states"].shape

    def levels(self, steps: int, latents: torch.Size) -> torch.Tensor:
        """The noise levels that the pipeline visits in `steps` steps, from noise to 0: float32 [steps + 1].

        Some pipelines shift them by the shape of the latents, so another shape than `latents` is refused.
        """
        _, shape = self.conditioning("", steps)
        if shape != latents:
            raise DitAccelError(
                f"The training data have latents of shape {tuple(latents)}, but {type(self.pipe).__name__} called with "
                f"{self.size or 'its own size'} makes {tuple(shape)}. Distillation needs data of one size, with "
                "height, width and, for a video, num_frames in dataset.json. Prepare them again."
            )
        return self.pipe.scheduler.sigmas.float().cpu().clone()

    @torch.no_grad()
    def generated(self, prompts: list[str], arguments: Mapping[str, Any], seed: int) -> Iterator[TrainingSample]:
        """The pipeline's own samples; the noise of the i-th prompt has seed `seed` + i."""
        for index, prompt in enumerate(prompts):
            call, shape = self.conditioning(prompt)
            generator = torch.Generator("cpu").manual_seed(seed + index)
            with _last_sample(self.pipe.scheduler) as latents:
                self.pipe(prompt=prompt, generator=generator, output_type="latent", **{**dict(arguments), **self.size})
            yield self._sample(latents[-1], shape, call, prompt)

    @torch.no_grad()
    def encoded(self, videos: Iterator[tuple[torch.Tensor, str]]) -> Iterator[TrainingSample]:
        """Samples of captioned videos, float32 [3, F, H, W] in [-1, 1], of the Preparer's size."""
        for video, caption in videos:
            call, shape = self.conditioning(caption)
            yield self._sample(encode(self.pipe, video[None], shape), shape, call, caption)

    def _sample(self, latents: torch.Tensor, wanted: torch.Size, call: Call, prompt: str) -> TrainingSample:
        if latents.shape != wanted:
            raise DitAccelError(
                f"{type(self.pipe).__name__} makes latents of shape {tuple(latents.shape)} and passes {tuple(wanted)} "
                "to its transformer. Training needs a pipeline that passes them unchanged."
            )
        return TrainingSample(latents.float().cpu(), call, prompt)


@contextlib.contextmanager
def _last_sample(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """A list that holds what the scheduler's last step returned; some pipelines put out latents of another shape."""
    step, last = scheduler.step, list[torch.Tensor]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        last[:] = [output[0]]
        return output

    scheduler.step = watched
    try:
        yield last
    finally:
        del scheduler.step


def encode(pipe: DiffusionPipeline, video: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Latents of a video as the transformer takes them.

    Args:
        pipe: its codec's configuration or buffers tell the scale of the latents.
        video: float32 [1, 3, F, H, W] in [-1, 1].
        shape: of the transformer's latents; [1, N, C] means packing by the pipeline's own function.

    Raises:
        DitAccelError: the codec does not tell the scale.
    """
    vae = pipe.vae
    layers = list(vae.modules())
    of_images = any(isinstance(layer, nn.Conv2d) for layer in layers) and not any(
        isinstance(layer, nn.Conv3d) for layer in layers
    )
    pixels = video.to(vae.device, vae.dtype)
    latents = vae.encode(pixels[:, :, 0] if of_images else pixels).latent_dist.mode().float()
    if hasattr(pipe, "_patchify_latents"):  # FLUX.2 scales 2 x 2 latents together
        latents = pipe._patchify_latents(latents)
    latents = _scaled(vae, latents)
    return _packed(pipe, latents) if len(shape) == 3 and hasattr(pipe, "_pack_latents") else latents


def _scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, ...] of a codec by its mean and deviation of each channel, or by its shift and factor."""
    config, buffers = vae.config, dict(vae.named_buffers())
    if "bn.running_mean" in buffers:  # FLUX.2
        statistics = [buffers["bn.running_mean"], (buffers["bn.running_var"] + config["batch_norm_eps"]).sqrt()]
    else:  # LTX has buffers of these names
        statistics = [config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std")]
    factor = config.get("scaling_factor")
    if statistics[0] is not None:
        mean, std = (
            torch.as_tensor(values, dtype=torch.float32, device=latents.device).view(-1, *([1] * (latents.ndim - 2)))
            for values in statistics
        )
        return (latents - mean) * (factor or 1.0) / std
    if factor is None:
        raise DitAccelError(
            f"{type(vae).__name__} does not state the scale of its latents. Train on the model's own samples."
        )
    return (latents - (config.get("shift_factor") or 0.0)) * factor


def _packed(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as a sequence of tokens [B, N, C], by the pipeline's own function."""
    config, sizes = pipe.transformer.config, latents.shape
    known = {"latents": latents, "batch_size": sizes[0], "num_channels_latents": sizes[1]}
    known |= {"height": sizes[-2], "width": sizes[-1]}
    known |= {name: config[name] for name in ("patch_size", "patch_size_t") if name in config}
    return pipe._pack_latents(**{name: known[name] for name in inspect.signature(pipe._pack_latents).parameters})


def captioned(folder: pathlib.Path, size: Mapping[str, int]) -> Iterator[tuple[torch.Tensor, str]]:
    """Captioned media of a folder as float32 [3, F, H, W] in [-1, 1], scaled to cover the size and cropped to it.

    Longer videos are cut at their end.

    Raises:
        DitAccelError: the folder holds no media, or a file has no caption or too few frames.
    """
    from dit_accel.generation.captioned import find_all, read_frames

    frames, height, width = size.get("num_frames", 1), size["height"], size["width"]
    for item in find_all(folder, "remove the file"):
        pixels = torch.from_numpy(read_frames(item.path)).permute(0, 3, 1, 2).float() / 127.5 - 1  # [F, 3, H, W]
        if len(pixels) < frames:
            raise DitAccelError(
                f"{item.path} has {len(pixels)} frames but {frames} are needed. Ask for fewer, or remove it."
            )
        pixels = pixels[:frames]
        scale = max(height / pixels.shape[2], width / pixels.shape[3])
        enlarged = [
            max(round(side * scale), wanted) for side, wanted in zip(pixels.shape[2:], (height, width), strict=True)
        ]
        pixels = nn.functional.interpolate(pixels, size=enlarged, mode="bilinear", antialias=True)
        top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
        yield pixels[:, :, top : top + height, left : left + width].clamp(-1, 1).transpose(0, 1), str(item.caption)


def demo_clips(count: int, size: Mapping[str, int], seed: int) -> Iterator[tuple[torch.Tensor, str]]:
    """Captioned clips of the embedded demo, from scenes outside its test set: float32 [3, F, H, W] in [-1, 1]."""
    from dit_accel.pipelines.demo import clips

    generator = torch.Generator().manual_seed(seed)
    for scene in clips.sample_scenes(count, generator):
        video = clips.render([scene], size["num_frames"], size["height"], size["width"], generator)
        yield video[0], scene.caption
