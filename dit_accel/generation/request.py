"""What generating and evaluating are asked alike: the model, where it runs, and the arguments of its call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.generation import call, sources

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.generation.sources import Source

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_FPS = 100  # a gif counts in hundredths of a second


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """How a model is asked for, wherever that is written; each field is the option of that name.

    Raises:
        DitAccelError: a dtype or a frame rate is none.
    """

    model: str = "demo"
    revision: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None
    pipe: Sequence[str] | None = None
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    vae_tiling: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DitAccelError(f"A dtype is one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        if self.fps is not None and not 1 <= self.fps <= MOST_FPS:
            raise DitAccelError(f"Videos have 1 to {MOST_FPS} frames a second; got {self.fps}.")

    def load_pipe(
        self, source: Source, dtype: torch.dtype, device: torch.device, loras: Sequence[str] = ()
    ) -> DiffusionPipeline:
        """The pipeline with its weights, tiled and compiled as asked.

        Raises:
            DitAccelError: it or a LoRA cannot be loaded.
        """
        pipe = sources.load(source, dtype, device, self.offload)
        call.prepare(pipe, loras, vae_tiling=self.vae_tiling, compile=self.compile)
        return pipe

    def arguments(
        self,
        pipe: DiffusionPipeline,
        own: Mapping[str, Any],
        shape: tuple[int, int, int],
        *,
        video: bool,
        **given: Any,
    ) -> dict[str, Any]:
        """The arguments of the pipeline's call.

        Args:
            pipe: the pipeline.
            own: the model's defaults.
            shape: frames, height and width in pixels.
            video: whether the call takes frames.
            given: further arguments.

        Raises:
            DitAccelError: as `call.call_arguments` says.
        """
        asked = {
            **given,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "num_frames": shape[0] if video else None,
            "height": shape[1],
            "width": shape[2],
        }
        return call.call_arguments(pipe, own, asked, self.pipe or ())

    def rate(self, pipe: DiffusionPipeline, source: Source, arguments: Mapping[str, Any]) -> int:
        """Frames a second of its videos."""
        return self.fps or call.frame_rate(pipe, arguments) or sources.frames_a_second(source)
