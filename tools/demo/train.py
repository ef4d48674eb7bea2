"""Train the demo pipeline from nothing: `python -m tools.demo.train --work RUN_FOLDER --workers 2`.

Flow matching on clips drawn on the fly (`clips.py`), by the stages in `STAGES`. Training stops and resumes anywhere: a
checkpoint holds weights, their moving average and the optimizers' state, and the random numbers of a step follow from
seed and step, so a resumed run gives the same weights bit for bit. `--export FOLDER` writes the averaged weights as a
Diffusers folder in bfloat16.

The weights in this package come from one such run, steered on its way: AdamW alone until step 1,860, slower clips until
step 2,680, equal weights for all channels and a smaller shift on small grids until step 3,120, shapes of any size
anywhere in the frame until step 4,400. The stages are what was run; with today's settings from the start they have not
been run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.pipelines.demo import clips
from tools.demo.fast_attention import TEXT_SLOTS, use_fast_attention
from tools.demo.model import SHIFT, build_pipeline

FILLERS = ("a", "moves", "on", "background")  # words that training sometimes replaces by <unk>


MUON_RATE = 3.0  # Muon's learning rate over AdamW's
MEAN_WEIGHT = 4.0  # of a block's mean in the loss; its slopes weigh 1, and where the shape is shows in the means


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: `steps` optimizer steps, each on a grid drawn from `grids`.

    A grid is (frames, height, width, batch) in pixels and clips. The learning rate goes from `start` to `end` along a
    half cosine.
    """

    name: str
    steps: int
    start: float
    end: float
    grids: tuple[tuple[int, int, int, int], ...]


STAGES = (
    Stage("small", 2300, 1.2e-3, 8e-4, ((9, 64, 64, 16), (9, 48, 80, 16), (9, 80, 48, 16), (17, 64, 64, 10))),
    Stage(
        "middle",
        350,
        8e-4,
        5e-4,
        (
            *((17, 64, 64, 10), (9, 96, 96, 8), (17, 96, 96, 4), (9, 48, 224, 6), (17, 128, 128, 4)),
            *((17, 64, 64, 10), (9, 80, 80, 10), (17, 96, 96, 4), (9, 192, 48, 6), (17, 128, 128, 4)),
        ),
    ),
    Stage(
        "motion", 450, 1e-3, 6e-4, ((9, 64, 64, 16), (17, 64, 64, 10), (9, 96, 96, 8), (17, 64, 96, 6), (17, 96, 64, 6))
    ),
    Stage("default", 240, 6e-4, 1.5e-4, ((17, 128, 128, 4), (17, 80, 80, 6), (17, 112, 144, 4))),
    Stage(
        "again",
        940,
        1e-3,
        6.5e-4,
        ((9, 64, 64, 16), (17, 64, 64, 10), (9, 64, 64, 16), (9, 80, 80, 10), (17, 96, 96, 4)),
    ),
    Stage("full", 120, 5.5e-4, 5e-5, ((17, 128, 128, 4), (17, 96, 96, 6), (17, 192, 224, 2), (17, 112, 144, 4))),
    Stage(
        "centred",
        520,
        1.2e-3,
        6e-4,
        ((9, 64, 64, 16), (17, 64, 64, 10), (9, 80, 80, 10), (9, 64, 64, 16), (17, 96, 96, 4)),
    ),
    Stage("centred default", 260, 6e-4, 1e-4, ((17, 128, 128, 4), (17, 112, 144, 4), (17, 96, 96, 6))),
    Stage("centred large", 70, 1.5e-4, 2e-5, ((17, 192, 224, 2), (17, 128, 128, 4))),
    Stage(
        "last",
        330,
        6e-4,
        4e-5,
        ((17, 128, 128, 4), (17, 112, 144, 4), (17, 128, 128, 4), (17, 96, 96, 6), (17, 192, 224, 2)),
    ),
    Stage(
        "wide",
        900,
        6e-4,
        3e-5,
        (
            *((17, 160, 192, 2), (17, 128, 128, 4), (17, 160, 192, 2)),
            *((17, 112, 144, 4), (17, 160, 160, 2), (17, 96, 96, 6)),
        ),
    ),
)


class Trainer:
    """Model, moving average, optimizer and random state of one run.

    Args:
        pipe: what `build_pipeline` returned; its transformer gets training-only attention processors.
        stages: the curriculum.
        seed: of the data, the noise and the dropped prompts.

    With `torch.distributed` initialised, each process takes an equal part of every batch; all must start alike.
    """

    def __init__(self, pipe: WanPipeline, stages: tuple[Stage, ...] = STAGES, seed: int = 0):
        self.pipe, self.stages, self.seed, self.step = pipe, stages, seed, 0
        self.rank, self.workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        use_fast_attention(pipe.transformer)
        self.generator = torch.Generator()
        self.importance = torch.tensor([MEAN_WEIGHT, 1.0, 1.0, 1.0] * 3)  # [12] per latent channel
        self.modules = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
        self.modules.train()
        self.weights = dict(self.modules.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        # Muon for the matrices inside the blocks, AdamW for all else.
        inner = [name for name, weight in self.weights.items() if ".blocks." in name and weight.ndim == 2]
        outer = [name for name in self.weights if name not in set(inner)]
        self.optimizers = {
            "muon": torch.optim.Muon([self.weights[name] for name in inner], 0.0, 0.01, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(
                [self.weights[name] for name in outer], 0.0, (0.9, 0.98), weight_decay=0.01, fused=True
            ),
        }

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def train_step(self) -> float:
        """One optimizer step on freshly drawn clips; returns the loss."""
        stage, rate = self.schedule()
        self.optimizers["adamw"].param_groups[0]["lr"] = rate
        self.optimizers["muon"].param_groups[0]["lr"] = MUON_RATE * rate
        self.generator.manual_seed((self.seed << 40) + (self.step << 8) + self.rank)
        frames, height, width, batch = stage.grids[self.step % len(stage.grids)]
        loss = self.loss(frames, height, width, batch // self.workers)
        loss.backward()
        if self.workers > 1:
            self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0, foreach=True)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.995, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        return loss.item()

    def loss(self, frames: int, height: int, width: int, batch: int) -> Tensor:
        """Mean squared error of the predicted velocity, noise - clip, on `batch` fresh clips."""
        shown = clips.sample_scenes(batch, self.generator)
        with torch.no_grad():
            latents = self._encode(clips.render(shown, frames, height, width, self.generator))
            tokens = latents[0, 0].numel() // 4
            sigma = self._noise_levels(batch, shift=SHIFT * max(1.0, math.sqrt(tokens / 2304)))
            noise = torch.randn(latents.shape, generator=self.generator)
            mix = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - mix) * latents + mix * noise
        text = self.embed([self.prompt(scene) for scene in shown])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.pipe.transformer(noisy, sigma * 1000, text, return_dict=False)[0]
        errors = (velocity.float() - (noise - latents)).square().mean((0, 2, 3, 4))
        return (errors * self.importance).mean()

    def save(self, path: Path) -> None:
        """Write everything that a resumed run needs to one safetensors file; the old file lives until it is done."""
        tensors = {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        for kind, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{kind}.{index}.{name}": value for name, value in state.items()}
        temporary = path.with_suffix(".part")
        save_file(tensors, temporary, metadata={"step": str(self.step)})
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote for the same model."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            self.step = int(file.metadata()["step"])
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weights.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
        for kind, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"{kind}."):
                    _, index, field = name.split(".")
                    state.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _share_gradients(self) -> None:
        """Replace every gradient by its mean over the processes."""
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.workers
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def schedule(self) -> tuple[Stage, float]:
        """The stage that the next step belongs to, and its learning rate; the first 100 steps warm up."""
        done = self.step
        for stage in self.stages:
            if done < stage.steps:
                break
            done -= stage.steps
        fall = 0.5 * (1 + math.cos(math.pi * min(done / stage.steps, 1)))
        rate = stage.end + (stage.start - stage.end) * fall
        return stage, rate * min(1.0, (self.step + 1) / 100)

    def _encode(self, video: Tensor) -> Tensor:
        """Normalised latents, as the pipeline's loop sees them."""
        codec = self.pipe.vae
        mean = torch.tensor(codec.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(codec.config.latents_std).view(1, -1, 1, 1, 1)
        return (codec.encode(video).latent_dist.mode() - mean) / std

    def _noise_levels(self, batch: int, shift: float) -> Tensor:
        """[batch] noise levels: five in six logit-normal, the rest uniform, all shifted towards pure noise."""
        levels = torch.sigmoid(torch.randn(batch, generator=self.generator))
        uniform, choice = torch.rand(2, batch, generator=self.generator)
        levels = torch.where(choice < 1 / 6, uniform, levels)
        return shift * levels / (1 + (shift - 1) * levels)

    def prompt(self, scene: clips.Scene) -> str:
        """The scene's caption: 10 % empty, 20 % paraphrased, now and then with an unknown word."""
        drop, other, which, *unknown = torch.rand(3 + len(FILLERS), generator=self.generator).tolist()
        if drop < 0.1:
            return ""
        template = clips.PARAPHRASES[int(which * len(clips.PARAPHRASES))] if other < 0.2 else clips.CAPTION
        words = scene.phrase(template).split()
        strange = {word for word, chance in zip(FILLERS, unknown, strict=True) if chance < 0.04}
        return " ".join("<unk>" if word in strange else word for word in words)

    def embed(self, prompts: list[str]) -> Tensor:
        """Text embeddings with zeros behind each prompt, [B, TEXT_SLOTS, text_dim], as the pipeline makes them."""
        ids = self.pipe.tokenizer(prompts, padding="max_length", max_length=TEXT_SLOTS, return_tensors="pt")
        if not (ids.attention_mask[:, -1] == 0).all():
            raise ValueError(f"captions must leave one of the {TEXT_SLOTS} text slots free; raise TEXT_SLOTS")
        hidden = self.pipe.text_encoder(ids.input_ids, ids.attention_mask).last_hidden_state
        return hidden * ids.attention_mask[..., None]


def export(trainer: Trainer, folder: Path) -> None:
    """Write the averaged weights as a Diffusers pipeline folder, in bfloat16."""
    modules = copy.deepcopy(trainer.modules)
    with torch.no_grad():
        for name, weight in modules.named_parameters():
            weight.copy_(trainer.average[name])
    modules.to(torch.bfloat16)
    WanPipeline(**(trainer.pipe.components | dict(modules.items()))).save_pretrained(folder)


def run(rank: int, options: argparse.Namespace) -> None:
    """One of `options.workers` training processes; the first one logs and saves."""
    if options.workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
        meeting = f"file://{options.meeting}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.workers)
    torch.manual_seed(options.seed)
    trainer = Trainer(build_pipeline(), seed=options.seed)
    checkpoint = options.work / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
    first = rank == 0
    saved, losses, began = time.monotonic(), [], time.monotonic()
    while trainer.step < trainer.total_steps:
        stage, rate = trainer.schedule()
        losses.append(trainer.train_step())
        if first and trainer.step % 60 == 0:
            pace = len(losses) / (time.monotonic() - began)
            row = {"step": trainer.step, "stage": stage.name, "rate": rate, "pace": pace}
            print(json.dumps(row | {"loss": sum(losses) / len(losses)}), flush=True)
            losses, began = [], time.monotonic()
        if first and time.monotonic() - saved > options.save_every:
            trainer.save(checkpoint)
            saved = time.monotonic()
    if first:
        trainer.save(checkpoint)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the run: its checkpoint")
    parser.add_argument("--export", type=Path, help="write the averaged weights of the checkpoint here, and stop")
    parser.add_argument("--workers", type=int, default=1, help="processes that share each batch and the threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.export:
        trainer = Trainer(build_pipeline())
        trainer.load(options.work / "checkpoint.safetensors")
        export(trainer, options.export)
    elif options.workers == 1:
        run(0, options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.meeting = Path(folder) / "meeting"
            torch.multiprocessing.spawn(run, (options,), nprocs=options.workers)


if __name__ == "__main__":
    main()
