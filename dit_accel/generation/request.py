"""Options that generating, evaluating, training and planning share; a field is the option of that name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dit_accel import values
from dit_accel.errors import DitAccelError
from dit_accel.generation import quantised, setup, sources
from dit_accel.pipelines.levels import LEVELS, Case
from dit_accel.registry import DENSE, parse_value
from dit_accel.schedule import Schedule
from dit_accel.setting import SCHEDULE, WORDS, Setting, parse_layers
from dit_accel.values import option

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.generation.candidate import Candidate
    from dit_accel.generation.sources import Source
    from dit_accel.pipelines.family import Family

MOST_STEPS = 10_000  # models learn 1,000 noise levels
PROMPT = "a red circle moves right on a blue background"  # shows what the embedded model can draw
METHOD_FORM = "METHOD[:KEY=VALUE,...]"
CACHE_FORM = "CACHE[:KEY=VALUE,...]"
LOAD_FORM = "FOLDER|FILE|HUB-ID"
PROMPTS_FORM = "FILE|LIST|FOLDER"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a preset or a level is chosen for.

    Args:
        family: of the model's transformers.
        transformers: their number.
        case: the model's calls.
    """

    family: Family
    transformers: int
    case: Case


def method_advice(family: Family | None) -> str:
    """Which options name a method for a model; `family` is its family, if it is known."""
    methods = "one that `dit-accel ls` lists" if family is None else family.methods
    return f"Add --method: {methods}. For a model there are --level {'|'.join(LEVELS)} and --preset, too."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions(values.Checked):
    """The model."""

    PANEL: ClassVar[str] = "Model"

    model: str = option("demo", "demo, a folder in Diffusers' format, or an id on the Hugging Face Hub.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions(values.Checked):
    """The device."""

    PANEL: ClassVar[str] = "Device and memory"

    device: str = option("auto", "Device, such as cuda:1 or cpu; auto takes a GPU if there is one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryOptions(DeviceOptions):
    """The device, and what trades memory for speed."""

    PANEL: ClassVar[str] = "Device and memory"

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "float32, bfloat16, float16 or auto, which is bfloat16 on a GPU and float32 elsewhere.",
        metavar="DTYPE",
    )
    offload: Literal["none", "model", "group"] = option(
        "none", "Keep weights in main memory, and move whole models or single layers to the GPU when they run."
    )
    vae_tiling: bool = option(False, "Decode in tiles to save memory.")
    quantize: str | None = option(
        None,
        f"Quantise the transformers as they load ({', '.join(quantised.TORCHAO)}), or take them from GGUF files.",
        metavar=f"TYPE|{quantised.GGUF}FILE[,FILE]",
    )
    compile: bool = option(False, "Compile the transformer's blocks with torch.compile.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeOptions(values.Checked):
    """The size of the output."""

    PANEL: ClassVar[str] = "Size"

    frames: int | None = option(None, "Number of frames; by default the model's own.", least=1)
    height: int | None = option(None, "Height in pixels; by default the model's own.", least=1)
    width: int | None = option(None, "Width in pixels; by default the model's own.", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(SizeOptions):
    """Arguments of the pipeline's call."""

    PANEL: ClassVar[str] = "Sampling"

    negative_prompt: str | None = option(None, "What the image or video should not show.")
    steps: int | None = option(None, "Number of denoising steps; by default the model's own.", least=1, most=MOST_STEPS)
    guidance: float | None = option(None, "Guidance scale; by default the model's own.", least=0)
    fps: int | None = option(None, "Frames per second of the video.", least=1, most=100)  # gif counts in 1/100 s
    pipe: tuple[str, ...] = option(
        (),
        "Any other argument of the pipeline's call, with its value in JSON; repeatable.",
        metavar="KEY=VALUE",
        repeatable=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleOptions(values.Checked):
    """Dense steps and layers, which `schedule.Schedule` checks, their back end, and a step cache."""

    PANEL: ClassVar[str] = "Method"

    dense_steps: Any = option(
        None,
        "How many of the first denoising steps stay dense, as a number or a share, such as 12 or 0.25.",
        metavar="N|SHARE",
        parse=parse_value,
    )
    dense_last_steps: Any = option(
        None, "How many of the last denoising steps stay dense.", metavar="N|SHARE", parse=parse_value
    )
    dense_layers: Any = option(
        None,
        "Layers that stay dense: how many of the first ones, or a list.",
        metavar="N|SHARE|I,J",
        parse=parse_layers,
    )
    dense_backend: str | None = option(
        None,
        "Diffusers' attention backend for everything that stays dense. auto: the fastest one with the same "
        "result. auto8: SageAttention or FlashAttention 3 if installed, once a call has verified it.",
    )

    cache: str | None = option(
        None,
        "Step cache, which skips blocks in some steps: steps, or Diffusers' first-block, mag, taylorseer, ...; none: "
        "without that of a level or a file.",
        metavar=CACHE_FORM,
    )

    @property
    def schedule(self) -> Schedule:
        """The steps and layers that stay dense."""
        return Schedule(**{name: value for name, value in self.words.items() if name in SCHEDULE})

    @property
    def words(self) -> dict[str, Any]:
        """Those that were given, as `Setting.make` takes them."""
        return {name: value for name in WORDS if (value := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingsOptions(values.Checked):
    """Settings besides those behind a method's name."""

    PANEL: ClassVar[str] = "Method"

    settings: tuple[str, ...] = option(
        (),
        "A setting of the method, repeatable. Values per axis are written 18x24x24.",
        flag="--set",
        metavar="KEY=VALUE",
        repeatable=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOptions(ScheduleOptions, SettingsOptions):
    """The method and its settings."""

    PANEL: ClassVar[str] = "Method"

    method: str | None = option(None, "How attention is computed; `dit-accel ls` lists methods.", metavar=METHOD_FORM)
    level: Literal["faithful", "balanced", "fast"] | None = option(
        None, "Settings and step cache for this model, size and number of steps, in place of --method."
    )
    preset: bool = option(
        False,
        "Use the settings recommended for this model and method; without --method, also the recommended "
        "method. Settings that you give take precedence.",
    )
    load: Path | None = option(
        None,
        "In place of --method: a saved accelerator, a settings file, or published weights (`dit-accel ls "
        "formats`). HUB-ID@REVISION selects a version of them.",
        metavar=LOAD_FORM,
    )
    any_weights: bool = option(False, "With --load: accept base weights other than those it was trained for.")
    keep_int8: bool = option(False, "With --load of int8 weights: keep them in int8, which needs torchao.")

    def candidate(self, subject: Callable[[], Subject] | None = None) -> Candidate:
        """The setting that these options make; the untouched pipeline's dense attention without any.

        `subject` tells what a level is chosen for and what `preset` takes; it is asked for these alone.

        Raises:
            DitAccelError: method, settings, schedule or back end are refused or contradict --load, the folder holds no
                saved accelerator, or nothing is recommended for the family.
        """
        from dit_accel.generation.candidate import Candidate

        if self.method in LEVELS:
            raise DitAccelError(f"{self.method} is a level, not a method. Write --level {self.method}.")
        of_method = self.preset or any(word in SCHEDULE for word in self.words)
        if self.level is not None:
            return self._of_level(subject)
        if self.load is not None:
            if self.method is not None or of_method:
                raise DitAccelError(
                    f"--load {self.load} has its own method, settings and schedule. Leave out --method, --preset and "
                    "--dense-*, or leave out --load."
                )
            return Candidate.read(
                self.load, self.settings, any_weights=self.any_weights, keep_int8=self.keep_int8, **self.words
            )
        if self.any_weights or self.keep_int8:
            option = "--any-weights" if self.any_weights else "--keep-int8"
            raise DitAccelError(f"{option} is for weights that --load reads. Add --load FOLDER, or leave it out.")
        if self.method is None and not self.preset and (of_method or self.settings):
            family = None if subject is None else subject().family
            raise DitAccelError(f"--set and --dense-* change a method, but none was given. {method_advice(family)}")
        if not self.preset:
            return Candidate(Setting.parse(DENSE if self.method is None else self.method, self.settings, **self.words))
        assert subject is not None
        family = subject().family
        preset = functools.partial(family.preset, transformers=subject().transformers)
        method = family.first_preset if self.method is None else self.method
        return Candidate(Setting.parse(method, self.settings, preset=preset, **self.words))

    def _of_level(self, subject: Callable[[], Subject] | None) -> Candidate:
        """The settings of the level for a model."""
        from dit_accel.generation.candidate import Candidate
        from dit_accel.hooks.levels import Level  # which imports PyTorch

        unused = {"--method": self.method, "--load": self.load, "--preset": self.preset, "--set": self.settings}
        unused |= {"--any-weights": self.any_weights, "--keep-int8": self.keep_int8}
        if others := [flag for flag, value in unused.items() if value]:
            raise DitAccelError(
                f"--level {self.level} has its own method and settings. Leave out {', '.join(others)}, or leave out "
                "--level."
            )
        assert self.level is not None and subject is not None
        level = Level.choose(self.level, subject().case)
        return Candidate(level.setting(**self.words), notes=(level.note,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRequest(SourceOptions, SamplingOptions, MemoryOptions):
    """A model and the arguments of its call."""

    def subject(self, source: Source) -> Subject:
        """What presets and levels are chosen for."""
        sizes = source.sizes()
        grid = sizes.grid(*sizes.chosen(self.frames, self.height, self.width))
        steps = self.steps or setup.default_of(source.pipeline_class(), source.call_defaults(), "num_inference_steps")
        device, _ = setup.placement(self.device, self.dtype, self.offload)
        family, known = source.family(), isinstance(steps, int)
        models = self.model, source.component_class("vae") or ""
        case = Case(family.name, models, sizes.video, grid.visual, steps if known else None, device.type != "cpu")
        return Subject(family, 1 if source.component_class("transformer_2") is None else 2, case)

    def load_pipe(
        self,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        arguments: Mapping[str, Any],
        loras: Sequence[str] = (),
    ) -> DiffusionPipeline:
        """The pipeline with the weights that these arguments need and LoRAs, tiled and compiled as asked."""
        pipe = sources.load(source, dtype, device, self.offload, arguments, self.quantize)
        setup.prepare(pipe, loras, vae_tiling=self.vae_tiling, compile=self.compile)
        return pipe

    def arguments(
        self, kind: type, defaults: Mapping[str, Any], shape: tuple[int, int, int], *, video: bool, **others: Any
    ) -> dict[str, Any]:
        """The arguments of the pipeline's call for frames, height and width; a `video` call takes the frames.

        `kind`, `defaults` and errors are as in `call.call_arguments`.
        """
        options = {
            **others,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "num_frames": shape[0] if video else None,
            "height": shape[1],
            "width": shape[2],
        }
        return setup.call_arguments(kind, defaults, options, self.pipe)

    def rate(self, kind: type, source: Source, arguments: Mapping[str, Any]) -> int:
        """Frames a second of the videos: from --fps, the call's argument, or the model."""
        frame_rate = setup.default_of(kind, arguments, "frame_rate", "fps")
        return self.fps or (round(frame_rate) if isinstance(frame_rate, int | float) else source.fps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRequest(MethodOptions, ModelRequest):
    """The options of `dit-accel generate`."""

    prompt: str = option(PROMPT, "What the image or video shows.")
    prompts: str | None = option(
        None,
        "A text file with a prompt a line, the built-in list demo or general, or captioned images or videos. "
        "Each prompt gets an output; the processes of `accelerate launch` share the work. Run the command "
        "again to resume.",
        metavar=PROMPTS_FORM,
    )
    image: Path | None = option(None, "First frame, for image-to-video models.", metavar="FILE")
    seed: int = option(0, "Seed of the noise, which is the same on every device.", least=0)
    lora: tuple[str, ...] = option((), "A LoRA for the transformer, repeatable.", metavar="PATH|ID", repeatable=True)
    verify: bool = option(False, "Compare each layer's first sparse call with dense attention.")
    keep_dense_above: float | None = option(
        None, "Like --verify, and layers with a larger relative error than this stay dense.", metavar="ERROR", above=0
    )
    compare: bool = option(
        False, "Also generate with dense attention, and show both side by side with times, PSNR and SSIM."
    )
    overwrite: bool = option(False, "Replace older outputs of this name that dit_accel wrote.")
    output: Path | None = option(
        None,
        "Output file: mp4, gif or png. A JSON record is written next to it. With --prompts, file names are "
        "numbered and NAME.jsonl lists all outputs.",
        metavar="FILE",
    )
