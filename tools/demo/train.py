"""Train the demo pipeline from nothing: `python -m tools.demo.train --config NAME --output FOLDER --device cuda`.

Flow matching on clips that are drawn on the training device (`clips.py`), by the stages of a recipe (`recipes.py`).
FOLDER gets the averaged weights as a Diffusers folder
in bfloat16 (`pipeline`) and a line of JSON every 50 steps (`log.jsonl`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch._dynamo
import torch.fx.experimental._config
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor

from dit_accel.pipelines.demo import clips
from tools.demo.forward import TEXT_SLOTS, predict, use_training_attention
from tools.demo.model import TEXT_DIM
from tools.demo.muon import BatchedMuon
from tools.demo.recipes import RECIPES, Grid, Recipe, Stage

FILLERS = ("a", "moves", "on", "background")  # words that training sometimes replaces by <unk>
MUON_RATE = 3.0  # Muon's learning rate over AdamW's
WATCHED = 1  # the block after which position and words are asked for
QUESTION_WEIGHT = 0.1  # of each of these questions in the loss
FULL = 9 * 24 * 24  # tokens of the grid whose noise schedule is shifted by the recipe's `shift`
WORDS = (len(clips.COLOURS), len(clips.SHAPES), len(clips.DIRECTIONS), len(clips.BACKGROUNDS))
LOG_EVERY = 50  # steps


class Trainer:
    """Model, moving average, optimizers and random state of one run.

    Args:
        pipe: what `build_pipeline` returned; its transformer gets training-only attention processors.
        recipe: the stages and what is learned.
        device: where everything runs.
        seed: of the data, the noise and the dropped prompts.
        compile: compile the transformer's blocks; a graph break or too many recompilations is an error.
    """

    def __init__(self, pipe: WanPipeline, recipe: Recipe, device: str = "cpu", seed: int = 0, compile: bool = False):
        self.pipe, self.recipe, self.device, self.seed, self.step = pipe.to(device), recipe, device, seed, 0
        self.generator = torch.Generator(device)
        use_training_attention(pipe.transformer)
        dim = pipe.transformer.patch_embedding.out_channels
        # Asked for in training alone: each token's place, and the scene's words from the prompt and from all tokens.
        self.questions = torch.nn.ModuleDict(
            {"position": torch.nn.Linear(dim, 3), "words": torch.nn.Linear(dim, sum(WORDS))}
            | {"prompt": torch.nn.Linear(TEXT_DIM, sum(WORDS))}
        ).to(device)
        self.modules = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
        self.modules.train()
        self.weights = dict(self.modules.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        # Muon for the matrices inside the blocks, AdamW for all else.
        inner = [name for name, weight in self.weights.items() if ".blocks." in name and weight.ndim == 2]
        outer = [weight for name, weight in self.weights.items() if name not in set(inner)]
        self.muon = BatchedMuon(self.weights[name] for name in inner)
        self.adamw = torch.optim.AdamW(
            [*outer, *self.questions.parameters()], 0.0, (0.9, 0.98), weight_decay=0.01, fused=True
        )
        codec = pipe.vae.config
        self.mean = torch.tensor(codec.latents_mean, device=device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(codec.latents_std, device=device).view(1, -1, 1, 1, 1)
        self._read_prompts()
        if compile:
            torch._dynamo.config.recompile_limit = 4
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance are not one size
            pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)

    def _read_prompts(self) -> None:
        """Words of all training scenes, [S, 4], and tokens of all their prompts, [S, templates, TEXT_SLOTS]."""
        scenes = clips.scenes(held_out=False)
        self.scenes = clips.describe(list(scenes)).to(self.device)
        templates = (clips.CAPTION, *clips.PARAPHRASES)
        prompts = [scene.phrase(template) for scene in scenes for template in templates]
        self.prompts = self._tokens(prompts).unflatten(0, (len(scenes), len(templates)))
        self.empty = self._tokens([""])
        tokenizer = self.pipe.tokenizer
        self.unknown = tokenizer.unk_token_id
        self.fillers = torch.tensor(tokenizer.convert_tokens_to_ids(list(FILLERS)), device=self.device)

    def _tokens(self, prompts: list[str]) -> Tensor:
        """Token numbers [B, TEXT_SLOTS] on the device."""
        ids = self.pipe.tokenizer(prompts, padding="max_length", max_length=TEXT_SLOTS, return_tensors="pt")
        if not (ids.attention_mask[:, -1] == 0).all():
            raise ValueError(f"captions must leave one of the {TEXT_SLOTS} text slots free; raise TEXT_SLOTS")
        return ids.input_ids.to(self.device)

    def train_step(self) -> Tensor:
        """One optimizer step on freshly drawn clips; returns the losses [4] of `loss`."""
        stage, rate = self.schedule()
        losses = self.backward(stage.grids[self.step % len(stage.grids)])
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0, foreach=True)
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        self.muon.step(MUON_RATE * rate)
        self.adamw.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.recipe.averaging, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        return losses

    def backward(self, grid: Grid) -> Tensor:
        """Gradients of one batch; the batch follows from the seed and the step."""
        self.generator.manual_seed(self.seed * 1_000_003 + self.step)  # a CPU's generator keeps 32 bits
        losses = self.loss(*grid)
        (losses[0] + QUESTION_WEIGHT * losses[1:].sum()).backward()
        return losses.detach()

    def loss(self, frames: int, height: int, width: int, batch: int) -> Tensor:
        """Losses on `batch` fresh clips, [4]: of the prediction, and of the questions position, words and prompt.

        Rotary positions are relative: all tokens of pure noise are alike but for the noise, and a model learns late to
        find the frame's borders in it. Asking each token for its place teaches that at once. Asking for the scene's
        words teaches which colour is the object's.
        """
        which = self._draw(batch, high=len(self.scenes))
        words = self.scenes[which]
        with torch.no_grad():
            paths = clips.sample_paths(words, frames, height, width, self.generator)
            video = clips.paint(words, paths, frames, height, width)
            latents = (self.pipe.vae.encode(video).latent_dist.mode() - self.mean) / self.std
            level, sigma = self._noise_levels(batch, latents[0, 0].numel() // 4)
            noise = torch.randn(latents.shape, generator=self.generator, device=self.device)
            noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        tokens = self._sample_prompts(which)
        text = self.embed(tokens)
        timestep = (sigma * 1000).floor()  # as the scheduler rounds
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            out, seen = predict(self.pipe.transformer, noisy, timestep, text, WATCHED)
        errors = (out.float() - latents).square().mean((1, 2, 3, 4)) / level.clamp(min=0.2).square()
        seen = F.layer_norm(seen.float(), seen.shape[-1:])
        _, _, t, h, w = latents.shape
        axes = [torch.linspace(-1, 1, size, device=self.device) for size in (t, h // 2, w // 2)]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # [N, 3]
        position = (self.questions["position"](seen) - place).square().mean()
        prompted = (tokens != self.empty).any(1).float()  # [B] 0 for an empty prompt
        shown = self._answer_loss(self.questions["words"](seen.mean(1)), words, prompted)
        embedded = text.sum(1) / (text != 0).any(2).sum(1, keepdim=True)  # [B, D] the mean of a prompt's tokens
        read = self._answer_loss(self.questions["prompt"](embedded), words, prompted)
        return torch.stack([errors.mean(), position, shown, read])

    def _answer_loss(self, answers: Tensor, words: Tensor, prompted: Tensor) -> Tensor:
        """Mean cross-entropy of answers [B, all words] for scenes [B, 4], over clips that have a prompt [B]."""
        columns = zip(answers.split(WORDS, dim=1), words.unbind(1), strict=True)
        losses = torch.stack([F.cross_entropy(answer, word, reduction="none") for answer, word in columns])
        return (losses.mean(0) * prompted).sum() / prompted.sum().clamp(min=1)

    def _draw(self, count: int, high: int | None = None) -> Tensor:
        """`count` whole numbers below `high`, or uniform numbers in [0, 1)."""
        if high is None:
            return torch.rand(count, generator=self.generator, device=self.device)
        return torch.randint(high, (count,), generator=self.generator, device=self.device)

    def schedule(self) -> tuple[Stage, float]:
        """The stage that the next step belongs to, and its learning rate; the first 100 steps warm up."""
        done = self.step
        for stage in self.recipe.stages:
            if done < stage.steps:
                break
            done -= stage.steps
        fall = 0.5 * (1 + math.cos(math.pi * min(done / stage.steps, 1)))
        rate = stage.end + (stage.start - stage.end) * fall
        return stage, rate * min(1.0, (self.step + 1) / 100)

    def _noise_levels(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """[batch] levels, three in four logit-normal and the rest uniform, and [batch] sigmas: shifted levels."""
        normal = torch.randn(batch, generator=self.generator, device=self.device)
        level = torch.where(self._draw(batch) < 0.25, self._draw(batch), torch.sigmoid(normal))
        shift = max(1.0, self.recipe.shift * math.sqrt(tokens / FULL))
        return level, shift * level / (1 + (shift - 1) * level)

    def _sample_prompts(self, which: Tensor) -> Tensor:
        """Tokens of prompts for these scenes: 10 % empty, 20 % paraphrased, now and then with an unknown word."""
        batch, templates = len(which), self.prompts.shape[1]
        other = torch.where(self._draw(batch) < 0.2, 1 + self._draw(batch, high=templates - 1), 0)
        tokens = self.prompts[which, other]
        strange = self._draw(batch * len(FILLERS)).view(batch, 1, -1) < 0.04
        tokens = torch.where(((tokens[..., None] == self.fillers) & strange).any(-1), self.unknown, tokens)
        return torch.where((self._draw(batch) < 0.1)[:, None], self.empty, tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """Text embeddings with zeros behind each prompt, [B, TEXT_SLOTS, text_dim], as the pipeline makes them."""
        mask = (tokens != self.pipe.tokenizer.pad_token_id).long()
        return self.pipe.text_encoder(tokens, mask).last_hidden_state * mask[..., None]


def rehearse(trainer: Trainer) -> None:
    """A batch of every grid without an update: compiles what is to be compiled."""
    for grid in dict.fromkeys(grid for stage in trainer.recipe.stages for grid in stage.grids):
        for _ in range(2):
            began = time.perf_counter()
            trainer.backward(grid)[0].item()
            seconds = time.perf_counter() - began
        print(f"grid {grid}: {1000 * seconds:.1f} ms, {grid[3] / seconds:.0f} clips/s", flush=True)
    for weight in (*trainer.weights.values(), *trainer.questions.parameters()):
        weight.grad = None


def export(trainer: Trainer, folder: Path) -> None:
    """Write the averaged weights as a Diffusers pipeline folder, in bfloat16."""
    pipe = trainer.recipe.build()
    modules = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    with torch.no_grad():
        for name, weight in modules.named_parameters():
            weight.copy_(trainer.average[name])
    modules.to(torch.bfloat16)
    pipe.save_pretrained(folder)


def run(trainer: Trainer, log: Path) -> None:
    """All steps of the recipe; a line of the log every `LOG_EVERY` steps and at the end."""
    total = sum(stage.steps for stage in trainer.recipe.stages)
    began, last, drawn = time.perf_counter(), time.perf_counter(), 0
    sums: list[Tensor] = []
    with log.open("w") as file:
        while trainer.step < total:
            stage, rate = trainer.schedule()
            drawn += stage.grids[trainer.step % len(stage.grids)][3]
            sums.append(trainer.train_step())
            if trainer.step % LOG_EVERY and trainer.step < total:
                continue
            losses = torch.stack(sums).mean(0).tolist()  # waits for the device
            now = time.perf_counter()
            row = {"step": trainer.step, "stage": stage.name, "rate": round(rate, 8), "loss": round(losses[0], 6)}
            row |= {
                name: round(loss, 6) for name, loss in zip(("position", "words", "prompt"), losses[1:], strict=True)
            }
            row |= {"seconds": round(now - began, 1), "clips_a_second": round(drawn / (now - last), 1)}
            print(json.dumps(row), file=file, flush=True)
            if trainer.step % (10 * LOG_EVERY) == 0:
                print(json.dumps(row), flush=True)
            if not all(map(math.isfinite, losses)):
                raise FloatingPointError(f"the loss is not finite at step {trainer.step}; lower the learning rate")
            last, drawn, sums = now, 0, []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=RECIPES, default="demo", help="the recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    recipe = RECIPES[options.config]
    pipe = recipe.build()
    trainer = Trainer(pipe, recipe, options.device, options.seed, options.compile)
    rehearse(trainer)
    run(trainer, options.output / "log.jsonl")
    export(trainer, options.output / "pipeline")


if __name__ == "__main__":
    main()
