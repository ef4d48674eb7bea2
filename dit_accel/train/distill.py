"""Multi-step consistency distillation: a student that needs as many steps as there are segments.

Source: Heek et al., "Multistep Consistency Models" (arXiv:2403.06807), as Efficient-vDiT (arXiv:2502.06155, section 3)
uses it on video. The noise levels are cut into segments. Within each, whatever point of a trajectory the student starts
from, one Euler step should take it to the same point at the segment's end. From a noisy sample x at σ:

1. the teacher (dense, with guidance) takes one step along its grid, from σ to σ';
2. the student, without gradient, jumps from there to the segment's end ε: y = x' + (ε − σ')·v(x', σ');
3. the velocity that leads from x to y in one step, (y − x) / (ε − σ), is what the student should predict at σ.

Where σ' = ε, step 2 is nothing and the teacher's own step is the target. Both grids are the pipeline's own (some give
their scheduler levels of their choice), so the student samples with it as it is: in `segments` steps, without guidance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dit_accel.errors import DitAccelError
from dit_accel.train.process import Flow, NoiseProcess, per_sample

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LevelSegments:
    """The grid of noise levels, and where each of them leads.

    Args:
        process: of the pipeline's scheduler.
        ends: levels that the pipeline visits in as many steps as there are segments, from noise to 0: float32 [S + 1].
        steps: the same for the teacher's steps.

    Raises:
        DitAccelError: the process is no flow.
    """

    def __init__(self, process: NoiseProcess, ends: torch.Tensor, steps: torch.Tensor) -> None:
        if not isinstance(process, Flow):
            raise DitAccelError("Consistency distillation is for flow-matching models; this one predicts otherwise.")
        levels = sorted({*ends.tolist(), *steps.tolist()}, reverse=True)
        merged = [levels[0]]
        for level in levels[1:]:
            if merged[-1] - level > 1e-6:  # the same level of both grids, up to rounding
                merged.append(level)
        starts = torch.tensor(merged)
        self.start = starts[:-1]  # [G] levels to train at
        self.next = starts[1:]  # [G] where the teacher's step leads
        below = ends[None, :] < self.start[:, None] - 1e-6
        self.end = torch.where(below, ends[None, :], -1.0).max(1).values  # [G] where the segment ends
        self.next = torch.maximum(self.next, self.end)

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of levels, int64 [batch], uniform."""
        return torch.randint(len(self.start), (batch,), generator=generator)

    @torch.no_grad()
    def target(self, noisy: torch.Tensor, index: torch.Tensor, teacher: Predict, student: Predict) -> torch.Tensor:
        """The velocity that leads to the segment's end, in the shape of `noisy`.

        Args:
            noisy: [B, ...] at the levels `start[index]`.
            index: int64 [B].
            teacher, student: velocities of a sample at levels [B].
        """
        here, there, end = (per_sample(levels[index], noisy) for levels in (self.start, self.next, self.end))
        moved = noisy + (there - here) * teacher(noisy, self.start[index])
        onward = student(moved, self.next[index])
        landed = torch.where(there > end + 1e-6, moved + (end - there) * onward, moved)
        return (landed - noisy) / (end - here)
