"""The rounds of a search, and what of it fits into a given time.

The rounds are successive halving: every round keeps the better half, and runs it on more denoising steps. Source:
Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", arXiv:1502.07943,
algorithm 1, with the number of steps as its resource. Rounds cost about the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from dit_accel.errors import DitAccelError
from dit_accel.eval.samples import Row
from dit_accel.generation.candidate import Candidate

FINALISTS = 4
FEWEST_STEPS = 2


class Round(NamedTuple):
    """How many settings run, and on how many denoising steps."""

    settings: int
    steps: int


def rounds(settings: int, steps: int) -> list[Round]:
    """All rounds of a search; the last one has all steps and at most `FINALISTS` settings."""
    counts = [settings]
    while counts[-1] > FINALISTS:
        counts.append(math.ceil(counts[-1] / 2))
    halvings = range(len(counts) - 1, -1, -1)
    return [Round(n, min(steps, max(FEWEST_STEPS, steps >> late))) for n, late in zip(counts, halvings, strict=True)]


class Pace(NamedTuple):
    """How long the dense model takes: seconds of a denoising step, and of all else in a call."""

    step: float
    overhead: float

    @classmethod
    def of(cls, row: Row) -> Pace:
        """That of a measured sample."""
        return cls(row["seconds_per_step"], max(0.0, row["seconds"] - row["denoising_seconds"]))

    def seconds(self, planned: Sequence[Round], prompts: int, stacked: int) -> float:
        """How long rounds take at most, if no setting is slower than dense.

        Every round also runs the dense model, and each of its settings first takes one step alone. The last round has
        `stacked` more settings.
        """
        total = 0.0
        for number, (settings, steps) in enumerate(planned, 1):
            runs = settings + 1 + (stacked if number == len(planned) else 0)
            total += runs * (prompts * (self.overhead + steps * self.step) + self.overhead + self.step)
        return total


class Affordable(NamedTuple):
    """What of a search fits into a time: its settings, whether layers are searched, and its seconds."""

    settings: list[Candidate]
    layers: bool
    seconds: float


def affordable(
    tried: Sequence[Candidate], minutes: float, pace: Pace, *, steps: int, prompts: int, stacked: int, layer_steps: int
) -> Affordable:
    """The largest part of a search that takes at most so many minutes.

    The layer search is left out first, then settings: each method keeps its first ones, and methods take turns.

    Args:
        tried: all settings, those of a method in the order in which they matter.
        steps, prompts: of the last round.
        stacked: settings that join the last round.
        layer_steps: of a layer search, after which up to `FINALISTS` settings join the last round; 0: no search.

    Raises:
        DitAccelError: there is no time for one setting.
    """
    methods: dict[str, list[Candidate]] = {}
    for candidate in tried:
        methods.setdefault(candidate.method, []).append(candidate)
    turns = [
        candidate for turn in itertools.zip_longest(*methods.values()) for candidate in turn if candidate is not None
    ]
    if layer_steps:
        seconds = layer_steps * pace.step + pace.seconds(rounds(len(turns), steps), prompts, stacked + FINALISTS)
        if seconds <= 60 * minutes:
            return Affordable(list(tried), True, seconds)
    for count in range(len(turns), 0, -1):
        seconds = pace.seconds(rounds(count, steps), prompts, stacked)
        if seconds <= 60 * minutes:
            chosen = turns[:count]
            return Affordable([candidate for candidate in tried if candidate in chosen], False, seconds)
    raise DitAccelError(
        f"--minutes {minutes:g} is too short: one setting takes {seconds / 60:.1f} minutes, because a dense step takes "
        f"{pace.step:.3g} s. Give more minutes, fewer prompts, or --cache none."
    )
