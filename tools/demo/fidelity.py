"""How near a video is to a true clip of its prompt: the clip's position, speed and size are fitted to the video."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.pipelines.demo import clips

ROUNDS = 50  # of Adam
BLUR = 8.0  # pixels of the fitted clip's edge in the first round, so that far-off paths feel the object too
SCALES = (1.0, 1.0, 0.1, 0.5)  # pixels that x, y, speed and radius move in a round at first
# Of a shape with radius one: area, and how far its centre of gravity lies below its centre.
AREAS = {"circle": 3.1416, "square": 4 * 0.88**2, "triangle": 1.8}
DROPS = {"circle": 0.0, "square": 0.0, "triangle": 0.2}


def nearest_clip(videos: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the true clip of each scene that is nearest to its video in mean squared error.

    Args:
        videos: float32 [B, 3, F, H, W] in [-1, 1].
        words: what `clips.describe` returned for the B scenes.

    Returns:
        PSNR [B] in decibels of the video against the fitted clip, over all frames, and the clip's paths [B, 4].
    """
    _, _, frames, height, width = videos.shape
    low, high = _bounds(videos)
    paths = first_guess(videos, words).clamp(low, high)
    offset = torch.zeros_like(paths, requires_grad=True)
    scales = paths.new_tensor(SCALES)
    optimizer = torch.optim.Adam([offset], lr=1.0)
    best, best_paths = torch.full_like(paths[:, 0], torch.inf), paths.clone()
    for turn in range(ROUNDS):
        left = 1 - turn / ROUNDS
        optimizer.param_groups[0]["lr"] = max(left**2, 0.01)
        moved = (paths + offset * scales).clamp(low, high)
        for edge in {clips.EDGE, max(clips.EDGE, BLUR * (4 * left - 3))}:
            error = (clips.paint(words, moved, frames, height, width, edge) - videos).square().mean((1, 2, 3, 4))
            if edge == clips.EDGE:
                better = error < best
                best = torch.where(better, error, best).detach()
                best_paths = torch.where(better[:, None], moved, best_paths).detach()
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
    return 10 * torch.log10(4 / best.clamp(min=4e-10)), best_paths


def _bounds(videos: Tensor) -> tuple[Tensor, Tensor]:
    """What a true clip's path [4] can be, a little wider; an object that left the frame or vanished is none."""
    height, width = videos.shape[3:]
    short = min(height, width)
    low = (0.3 * width, 0.3 * height, 0.0, 0.9 * clips.SMALLEST * short)
    high = (0.7 * width, 0.7 * height, clips.MAX_SPEED, 1.1 * clips.LARGEST * short)
    return videos.new_tensor(low), videos.new_tensor(high)


def first_guess(videos: Tensor, words: Tensor) -> Tensor:
    """Paths [B, 4] from the object's centre of gravity and area in each frame."""
    batch, _, frames, height, width = videos.shape
    colour, shape, direction, background = words.unbind(1)
    tables = [[clips.PALETTE[name] for name in names] for names in (clips.COLOURS, clips.BACKGROUNDS)]
    ink, paper = (
        videos.new_tensor(table)[which] * 2 - 1 for table, which in zip(tables, (colour, background), strict=True)
    )
    towards = (ink - paper) / (ink - paper).square().sum(1, keepdim=True)  # [B, 3]
    alpha = ((videos - paper.view(batch, 3, 1, 1, 1)) * towards.view(batch, 3, 1, 1, 1)).sum(1)
    alpha = torch.where(alpha > 0.3, alpha, 0.0).clamp(max=1)  # [B, F, H, W]
    mass = alpha.sum((2, 3)).clamp(min=1e-3)  # [B, F]
    x = (alpha.sum(2) * (torch.arange(width, device=videos.device) + 0.5)).sum(2) / mass
    y = (alpha.sum(3) * (torch.arange(height, device=videos.device) + 0.5)).sum(2) / mass
    area, drop = (videos.new_tensor([table[name] for name in clips.SHAPES])[shape] for table in (AREAS, DROPS))
    radius = (mass.median(1).values / area).sqrt().clamp(2, min(height, width) / 2)
    time = torch.arange(frames, device=videos.device) - max(frames - 1, 1) / 2
    spread = time.square().sum().clamp(min=1e-3)
    heading = videos.new_tensor(list(clips.DIRECTIONS.values()))[direction]
    slope = torch.stack([(x * time).sum(1), (y * time).sum(1)], dim=1) / spread  # [B, 2] pixels a frame
    speed = (slope * heading).sum(1)
    return torch.stack([x.mean(1), y.mean(1) - drop * radius, speed, radius], dim=1)
