"""Multi-step consistency distillation: the student samples in as many steps as there are segments.

Source: Heek et al., "Multistep Consistency Models" (arXiv:2403.06807), as Efficient-vDiT (arXiv:2502.06155, section 3)
uses it on video. The noise levels are cut into segments. In a segment, one Euler step from any point of a trajectory
should lead to the same point at the segment's end. From a noisy sample x at σ:

1. The teacher (dense, with guidance) takes one step along its grid, from σ to σ'.
2. The student, without gradient, jumps from there to the segment's end ε: y = x' + (ε − σ')·v(x', σ').
3. The student's target at σ is the velocity from x to y in one step: (y − x) / (ε − σ). A model
   that predicts the clean sample is read, and taught, by the velocity that its prediction means (`Flow.velocity`).

If σ' = ε, step 2 is void and the teacher's step is the target. Both grids are those of the pipeline, so the student
samples with the unchanged pipeline: in `segments` steps, without guidance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dit_accel.errors import DitAccelError
from dit_accel.train.process import Flow, NoiseProcess, per_sample

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LevelSegments:
    """The noise levels to train at, the next level of each, and the end of its segment.

    Args:
        process: of the pipeline's scheduler.
        ends: levels that the pipeline visits in as many steps as there are segments, from noise to 0: float32 [S + 1].
        steps: the same for the teacher's steps.

    Raises:
        DitAccelError: the process is no flow.
    """

    def __init__(self, process: NoiseProcess, ends: torch.Tensor, steps: torch.Tensor) -> None:
        if not isinstance(process, Flow):
            raise DitAccelError("Consistency distillation needs a flow-matching model; choose another objective.")
        self.process = process
        levels = sorted({*ends.tolist(), *steps.tolist()}, reverse=True)
        merged = [levels[0]]
        for level in levels[1:]:
            if merged[-1] - level > 1e-6:  # else the same level of both grids, up to rounding
                merged.append(level)
        starts = torch.tensor(merged)
        self.start = starts[:-1]  # [G] levels to train at
        self.next = starts[1:]  # [G] levels after the teacher's step
        below = ends[None, :] < self.start[:, None] - 1e-6
        self.end = torch.where(below, ends[None, :], -1.0).max(1).values  # [G] ends of their segments
        self.next = torch.maximum(self.next, self.end)

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of levels, int64 [batch], uniform."""
        return torch.randint(len(self.start), (batch,), generator=generator)

    @torch.no_grad()
    def target(self, noisy: torch.Tensor, index: torch.Tensor, teacher: Predict, student: Predict) -> torch.Tensor:
        """What means the velocity that leads to the segment's end, in the shape of `noisy`.

        Args:
            noisy: [B, ...] at the levels `start[index]`.
            index: int64 [B].
            teacher, student: predictions of a sample at levels [B].
        """
        here, there, end = (per_sample(levels[index], noisy) for levels in (self.start, self.next, self.end))
        velocity, start, after = self.process.velocity, self.start[index], self.next[index]
        moved = noisy + (there - here) * velocity(teacher(noisy, start), noisy, start)
        onward = velocity(student(moved, after), moved, after)
        landed = torch.where(there > end + 1e-6, moved + (end - there) * onward, moved)
        return self.process.prediction((landed - noisy) / (end - here), noisy, start)
