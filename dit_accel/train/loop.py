"""The training loop, on Hugging Face accelerate: any number of processes, mixed precision, accumulation, FSDP.

A run writes to one folder: `losses.jsonl`, `checkpoints/`, `validation/`, and at the end the trained accelerator, which
`dit_accel.load` takes. A run that is started again with the same settings resumes from its last checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dit_accel.accelerator import accelerate
from dit_accel.checkpoint import lora as adapters
from dit_accel.errors import DitAccelError
from dit_accel.generation.processes import meet
from dit_accel.generation.sampling import progress_bar
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.targets import find_transformers
from dit_accel.registry import get_method, learned_attributes
from dit_accel.train import card, state
from dit_accel.train.card import Base
from dit_accel.train.data import Dataset, Order, TrainingSample, collate
from dit_accel.train.networks import TrainingNetworks, expanded
from dit_accel.train.objectives import NEEDS_TEACHER, losses
from dit_accel.train.prepare import Preparer, find_transformer
from dit_accel.train.process import LevelSegments, process_of
from dit_accel.train.processes import StopSignal, join, mixed_precision, reserved
from dit_accel.train.settings import TrainSettings
from dit_accel.train.state import Validation

# settings that a resumed run may change; of accumulation the product with the number of processes stays
MAY_CHANGE = ("steps", "save_every", "validate_every", "tracker", "accumulation")
MICRO_BATCHES = "micro-batches a step"
FLOOR = 0.1  # share of the rate at the end of a cosine


def train(
    pipe: DiffusionPipeline,
    settings: TrainSettings,
    data: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    base: Base,
    validation: Validation | None = None,
    call: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Fine-tune a pipeline's transformer while a method computes its attention.

    The trained accelerator is active afterwards. Its `remove` leaves the trained LoRA or weights in place; a fresh
    pipeline that loads the result can remove both. Under `accelerate launch` every process calls this.

    Args:
        pipe: the dense pipeline, on the device to train on.
        data: folder that `prepare.py` made.
        output: folder of the run, which is returned; see the module.
        call: arguments of the pipeline's calls after training; saved with the result.

    Raises:
        DitAccelError: data, model and settings do not fit, another run has the folder, the loss is not finite, or the
            disk is full. Earlier checkpoints stay.
    """
    folder = pathlib.Path(output)
    with reserved(folder, meet().is_main_process):
        trainer = Trainer(pipe, settings, Dataset(pathlib.Path(data)), folder, base, validation)
        trainer.run()
        trainer.export(dict(call or {}))
    return folder


def lora_targets(transformer: nn.Module, family: Family, settings: TrainSettings) -> list[str]:
    """The names of the linear layers that a LoRA adapts: those of self-attention, or what `targets` says."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if settings.targets is None:
        layers, learned = tuple(f"{name}." for name, _ in family.attentions(transformer)), learned_attributes()
        return [name for name in linear if name.startswith(layers) and learned.isdisjoint(name.split("."))]
    ends = tuple(f".{target}" for target in settings.targets)
    return [name for name in linear if f".{name}".endswith(ends)]


def least_memory(
    transformer: nn.Module, family: Family, settings: TrainSettings, tokens: int, device: torch.device
) -> dict[str, int]:
    """Bytes that a run takes at least besides the model, by option; checkpointing does not lower it.

    The LoRA has weights, gradients and AdamW's two moments in float32. The backward pass needs each layer's input.

    Args:
        tokens: visual tokens of a sample.
    """
    modules = dict(transformer.named_modules())
    linear: list[Any] = [modules[name] for name in lora_targets(transformer, family, settings)]
    sides = sum(module.in_features + module.out_features for module in linear)
    width = max((module.in_features for module in linear), default=0)
    layers = sum(1 for _ in family.attentions(transformer))
    lora = settings.rank if settings.trains_model else 0
    half = 2 if mixed_precision(settings.precision, device) != "no" else 4
    return {"--rank": 4 * 4 * lora * sides, "--batch": half * settings.batch * layers * tokens * width}


@dataclasses.dataclass
class Trainer:
    """One run; see `train`."""

    pipe: DiffusionPipeline
    settings: TrainSettings
    data: Dataset
    output: pathlib.Path
    base: Base
    validation: Validation | None

    def __post_init__(self) -> None:
        settings, shape = self.settings, self.data[0].latents.shape
        self.transformer = find_transformer(self.pipe)
        self.hf = join(settings, self.output)
        self.settings = settings = dataclasses.replace(settings, precision=self.hf.mixed_precision)
        self.order = Order(self.data.kinds(), settings.batch, settings.seed)
        self.process = process_of(self.pipe.scheduler, shape)
        self.segments: LevelSegments | None = None
        if "consistency" in settings.objectives:
            preparer, wanted = Preparer(self.pipe, self.data.about), settings.distillation
            ends, steps = (preparer.levels(count, shape) for count in (wanted.segments, wanted.teacher_steps))
            self.segments = LevelSegments(self.process, ends, steps)
        self.fingerprint = adapters.fingerprint(self.transformer)
        self._make_student()
        self.step = 0
        self._resume()

    def _make_student(self) -> None:
        """Accelerate the transformer, choose the weights to train, and prepare both with Hugging Face accelerate."""
        settings = self.settings
        torch.manual_seed(settings.seed)  # LoRA's A matrices
        family = find_transformers(self.pipe)[0]["transformer"][1]
        lora = settings.rank > 0 and settings.trains_model
        needs_teacher = {*NEEDS_TEACHER, "consistency"} & settings.objectives.keys()
        copied = needs_teacher and not lora
        teacher = copy.deepcopy(self.transformer).requires_grad_(False).eval() if copied else None
        self.accel = accelerate(self.pipe, settings.setting(), impl=settings.impl)
        if lora:
            alpha = settings.rank if settings.alpha is None else settings.alpha
            adapters.add_lora(self.transformer, lora_targets(self.transformer, family, settings), settings.rank, alpha)
        else:
            self.transformer.requires_grad_(settings.trains_model)
        learner = get_method(self.accel.setting.method)
        for module in self.accel.learned_weights().values():
            learner.choose_trained(module, settings.objectives, with_model=settings.trains_model)
        if settings.checkpointing:
            self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        count = sum(1 for _ in family.attentions(self.transformer))
        layers = tuple(range(settings.attention_every - 1, count, settings.attention_every))
        self.networks = TrainingNetworks(
            self.transformer,
            family,
            self.accel,
            lora=lora,
            layers=layers if "attention" in settings.objectives else (),
            objectives=settings.objectives,
            teacher=teacher,
        )
        self.transformer.train()
        groups = self._groups()
        if not groups:
            raise DitAccelError("Nothing would be trained: rank=0 trains all weights, a rank above 0 trains a LoRA.")
        optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay)
        self.model, self.optimizer = self.hf.prepare(self.transformer, optimizer)
        self.weights = {name: weight for name, weight in self.transformer.named_parameters() if weight.requires_grad}
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()} if settings.ema else {}

    def _groups(self) -> list[dict[str, Any]]:
        """Weights by learning rate; `rate` of a group is the rate without warm-up and decay."""
        method = {id(weight) for module in self.accel.learned_weights().values() for weight in module.parameters()}
        trained = [weight for weight in self.transformer.parameters() if weight.requires_grad]
        rates = (self.settings.rate, self.settings.method_rate or self.settings.rate)
        sides = ([w for w in trained if id(w) not in method], [w for w in trained if id(w) in method])
        return [
            {"params": weights, "rate": rate, "lr": rate} for weights, rate in zip(sides, rates, strict=True) if weights
        ]

    def run(self) -> None:
        """Train to the last step."""
        main = self.hf.is_main_process
        curve = state.open_losses(self.output / state.LOSSES, self.step) if main else None
        stop = StopSignal(hold=self.hf.num_processes == 1)  # a checkpoint needs all processes
        began, first, settings = time.monotonic(), self.step, self.settings
        with progress_bar("training: loss {task.fields[loss]}, {task.fields[pace]} steps/s", show=main) as bar, stop:
            task = bar.add_task("", total=settings.steps, completed=first, loss="-", pace="-")
            while self.step < settings.steps:
                figures = self._train_step()
                if curve is not None:
                    curve.write(json.dumps({"step": self.step, **figures}) + "\n")
                self.hf.log(figures, step=self.step)
                pace = (self.step - first) / (time.monotonic() - began)
                bar.update(task, advance=1, loss=f"{figures['loss']:.4g}", pace=f"{pace:.2f}")
                if self.step % settings.save_every == 0 or self.step == settings.steps or stop.signalled:
                    self._save()
                stop.follow()
                if self.validation and settings.validate_every and self.step % settings.validate_every == 0:
                    self._validate()
        if curve is not None:
            curve.close()

    def _train_step(self) -> dict[str, float]:
        """Take an optimizer step; return its rate and its losses, averaged over micro-batches and processes."""
        settings = self.settings
        factor = self._rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        total = torch.zeros(1 + len(settings.objectives), device=self.hf.device)
        for micro in range(settings.accumulation):
            position = (self.step * settings.accumulation + micro) * self.hf.num_processes + self.hf.process_index
            with self.hf.accumulate(self.model):
                batch = collate([self.data[i] for i in self.order[position]])
                parts = self._losses(batch, position)
                loss = torch.stack([weight * parts[name] for name, weight in settings.objectives.items()]).sum()
                self.hf.backward(loss)
                total += torch.stack([loss, *parts.values()]).detach() / settings.accumulation
                if self.hf.sync_gradients:
                    figures = self.hf.reduce(total, "mean").tolist()
                    self._check(figures[0])
                    if settings.clip:
                        self.hf.clip_grad_norm_(self.weights.values(), settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            decay = min(settings.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        means = dict(zip(settings.objectives, figures[1:], strict=True))
        return {"loss": figures[0], **means, "rate": settings.rate * factor}

    def _losses(self, batch: TrainingSample, position: int) -> dict[str, torch.Tensor]:
        """Each objective's loss on a micro-batch. The student's call comes last; see `networks.py`."""
        generator = torch.Generator().manual_seed((self.settings.seed << 40) + position)
        clean, call = batch.latents.to(self.hf.device), batch.call
        count = len(clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        if torch.rand(1, generator=generator).item() < self.settings.empty_prompts:
            call = expanded(self.data.negative, count)
        index = None
        if self.segments is None:
            level = self.process.draw(count, self.settings.levels, generator)
        else:
            index = self.segments.draw(count, generator)
            level = self.segments.start[index]
        noisy = self.process.noisy(clean, noise, level)
        target = self.process.target(clean, noise, level)
        timestep = self.process.timestep(level)
        if self.segments is not None and index is not None:
            negative = expanded(self.data.negative, count)
            scale = self.settings.distillation.guidance
            target = self.segments.target(
                noisy,
                index,
                lambda x, at: self.networks.guided(x, self.process.timestep(at), call, negative, scale),
                lambda x, at: self.networks.outputs(self.model, x, self.process.timestep(at), call).prediction,
            )
        needs_teacher = set(NEEDS_TEACHER) & self.settings.objectives.keys()
        teacher = self.networks.teacher(noisy, timestep, call) if needs_teacher else None
        student = self.networks.outputs(self.model, noisy, timestep, call)
        return losses(self.settings.objectives, student, teacher, target)

    def _check(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        checkpoints = state.checkpoints_in(self.output / "checkpoints")
        last = f"The last good checkpoint is {checkpoints[-1]}" if checkpoints else "There is no checkpoint yet"
        raise DitAccelError(
            f"The loss is {loss} at step {self.step + 1}. {last}. Lower the learning rate ({self.settings.rate}) or "
            f"the gradient clip ({self.settings.clip}), or check the data, and start again."
        )

    def _rate_factor(self) -> float:
        step, total = self.step, self.settings.steps
        factor = min(1.0, (step + 1) / (self.settings.warmup + 1))
        if self.settings.decay == "cosine":
            factor *= FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / total))
        return factor

    def _save(self) -> None:
        parts = {
            "weights": {name: state.whole(weight) for name, weight in self.weights.items()},
            "average": {name: state.whole(weight) for name, weight in self.average.items()},
            "optimizer": state.optimizer_tensors(self.optimizer.optimizer, self.weights, self.hf.scaler),
        }
        if self.hf.is_main_process:
            state.save(self.output / "checkpoints", self.step, parts, self._record())
        self.hf.wait_for_everyone()

    def _record(self) -> dict[str, Any]:
        """The values that a resumed run and its checkpoint share."""
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in MAY_CHANGE}
        return {
            "settings": settings,
            "model": self.fingerprint,
            "samples": len(self.data),
            MICRO_BATCHES: self.settings.accumulation * self.hf.num_processes,
        }

    def _resume(self) -> None:
        checkpoints = state.checkpoints_in(self.output / "checkpoints")
        if not checkpoints:
            return
        self.step, parts, saved = state.load(checkpoints[-1])
        present = json.loads(json.dumps(self._record()))
        for record in (saved, present):
            settings = record.pop("settings")
            record.update({name: value for name, value in settings.items() if name not in MAY_CHANGE})
        for name, was in saved.items():
            if was != present.get(name):
                keep = " Change --accumulation so that its product with the processes stays." * (name == MICRO_BATCHES)
                raise DitAccelError(
                    f"{checkpoints[-1]} belongs to another run: its {name} was {was} and is {present.get(name)} now."
                    f"{keep} Give another --output, or delete that folder to start again."
                )
        with torch.no_grad():
            for part, weights in (("weights", self.weights), ("average", self.average)):
                for name, weight in weights.items():
                    weight.copy_(state.like(parts[part][name], weight))
        state.restore_optimizer(self.optimizer.optimizer, self.weights, self.hf.scaler, parts["optimizer"])

    def _swap_average(self) -> None:
        """Exchange weights and averaged weights."""
        with torch.no_grad():
            for name, average in self.average.items():
                present = self.weights[name].detach().clone()
                self.weights[name].copy_(average)
                average.copy_(present)

    def _validate(self) -> None:
        assert self.validation is not None
        self._swap_average()
        self.transformer.eval()
        samples = self.validation.generate(self.pipe)
        self.transformer.train()
        self._swap_average()
        if self.hf.is_main_process:
            self.validation.write(self.output / "validation" / f"step-{self.step:08d}", samples)

    def export(self, call: dict[str, Any]) -> None:
        """Put the averaged weights in place and write the trained accelerator with its card."""
        self.networks.close()
        self._swap_average()
        self.transformer.eval()
        self.model = self.hf.unwrap_model(self.model, keep_fp32_wrapper=False)
        for name, weight in self.weights.items():
            if isinstance(weight, state.DTensor):
                owner, _, attribute = name.rpartition(".")
                setattr(self.transformer.get_submodule(owner), attribute, nn.Parameter(state.whole(weight)))
        self.accel.trained = adapters.Trained(
            self.base.model,
            self.base.revision,
            {"transformer": self.fingerprint},
            lora=self.settings.rank > 0 and self.settings.trains_model,
            full=self.settings.rank == 0 and self.settings.trains_model,
            call=call,
        )
        if self.hf.is_main_process:
            card.write(self.output, self.base, self.accel, self.settings, self.data, self.step)
            self.accel.save_pretrained(self.output)
        self.hf.wait_for_everyone()
        self.hf.end_training()
