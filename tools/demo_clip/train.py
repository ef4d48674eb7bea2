"""Train the embedded CLIP on frames of the demo's clips: `python -m tools.demo_clip.train --export FOLDER`.

Contrastive learning (Radford et al. 2021) with hard negatives. A batch has groups of four scenes: three of them differ
from the first in exactly one attribute each. Equal scenes count as right anywhere in the batch. Frames are drawn on the
fly and spoilt. No clip is stored, and the scenes of `frames.never_shown` are never drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from dit_accel.eval.networks import DEMO_CLIP, DEMO_CLIP_FOLDER, Clip
from dit_accel.pipelines.demo import clips
from dit_accel.pipelines.demo.clips import Scene
from tools.demo.model import build_tokenizer
from tools.demo_clip.frames import (
    SIDE,
    SIZES,
    VISIBLE,
    difference,
    draw,
    spoil,
    training_scenes,
    triple,
    variants,
)

TEXT_SLOTS = 16  # tokens of the longest caption and its end, with room for a few more
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
HOTTEST = math.log(100)  # the largest logit scale, as CLIP's own training limits it


def build_clip() -> Clip:
    """The model with random weights; draw after `torch.manual_seed` for the same weights again."""
    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_SLOTS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "image_size": SIDE,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=math.log(10))
    size = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=MEAN, image_std=STD)
    return Clip(DEMO_CLIP, CLIPModel(config), tokenizer, processor)


def sample_batch(groups: int, generator: torch.Generator) -> list[Scene]:
    """`groups` training scenes, each followed by three that differ from it in colour, shape and background alone."""
    pool = training_scenes()
    allowed = set(pool)
    batch: list[Scene] = []
    while len(batch) < (1 + len(VISIBLE)) * groups:
        scene = pool[_draw(len(pool), generator)]
        others = [other for other in variants(scene) if other in allowed]
        by_name = {name: [other for other in others if difference(scene, other) == name] for name in VISIBLE}
        if all(by_name.values()):
            batch += [scene, *(some[_draw(len(some), generator)] for some in by_name.values())]
    return batch


def phrase(scene: Scene, generator: torch.Generator) -> str:
    """The scene's caption, or in three cases of ten a paraphrase."""
    template = clips.CAPTION
    if torch.rand((), generator=generator) < 0.3:
        template = clips.PARAPHRASES[_draw(len(clips.PARAPHRASES), generator)]
    return scene.phrase(template)


def contrastive(images: Tensor, texts: Tensor, shown: list[Scene], scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy; all that show the same share the target.

    Args:
        images, texts: unit vectors [B, D].
        shown: the B scenes.
        scale: what cosines are multiplied by.
    """
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(map(triple, shown)))}
    index = torch.tensor([kinds[triple(scene)] for scene in shown])
    same = (index[:, None] == index).float()
    target = same / same.sum(1, keepdim=True)  # symmetric, since equal rows have equal sums
    logits = scale * images @ texts.T
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def train(clip: Clip, steps: int, groups: int, rate: float, seed: int, log_every: int = 25) -> None:
    """Train in place: AdamW, 5 % warm-up, half-cosine learning rate, gradient norm 1; prints a JSON line at times."""
    generator = torch.Generator().manual_seed(seed)
    model = clip.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    warm = max(1, steps // 20)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    losses: list[float] = []
    began = time.monotonic()
    for step in range(1, steps + 1):
        shown = sample_batch(groups, generator)
        size = SIZES[_draw(len(SIZES), generator)]
        pixels = clip.prepare(spoil(draw(shown, size, generator), generator))
        tokens = clip.tokenizer([phrase(scene, generator) for scene in shown], padding=True, return_tensors="pt")
        images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        texts = model.text_projection(model.text_model(**tokens).pooler_output)
        images, texts = (functional.normalize(vectors, dim=-1) for vectors in (images, texts))
        loss = contrastive(images, texts, shown, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pace.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=HOTTEST)
        losses.append(loss.item())
        if step % log_every == 0 or step == steps:
            row = {"step": step, "loss": sum(losses) / len(losses), "scale": model.logit_scale.exp().item()}
            print(json.dumps(row | {"seconds": round(time.monotonic() - began)}), flush=True)
            losses = []
    model.eval()


def export(clip: Clip, folder: Path) -> None:
    """Write the model in transformers' format, weights in float16; the folder appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".clip-") as place:
        part = Path(place) / "weights"
        part.mkdir(mode=0o755)
        clip.tokenizer.save_pretrained(part)
        clip.model.config.save_pretrained(part)
        weights = {name: weight.half().contiguous() for name, weight in clip.model.state_dict().items()}
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        clip.processor.save_pretrained(part)
        if folder.exists():
            os.replace(folder, Path(place) / "old")
        os.replace(part, folder)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, default=DEMO_CLIP_FOLDER, help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--groups", type=int, default=16, help="groups of four frames in a batch")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    clip = build_clip()
    train(clip, options.steps, options.groups, options.rate, options.seed)
    export(clip, options.export)


if __name__ == "__main__":
    main()
