"""Levels: the settings that `accelerate(pipe)` takes for a model, a length, a number of steps and a device, as data.

A level is "faithful", "balanced" or "fast". Its settings are the first row of a table that fits the case: rows of the
model's family first, which were published or measured, then general rows, which were not measured on the family.

A step cache carries the gain, and sparse attention the loss, until a sequence is long (`GAINS_FROM`). So a short
sequence gets a cache alone, and a long one both; "faithful" always is a cache alone. The embedded model has a cache
alone at 8,064 tokens, too: docs/results.md compares it with both. Of few steps none can be left out: there a level is
sparse attention behind one dense step, and nothing on short sequences.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

LEVELS = ("faithful", "balanced", "fast")
DEFAULT = "balanced"
FEW = 8  # steps of a distilled model at most
# Visual tokens from which sparse attention gains, by "makes videos" and "on a GPU". On two CPU cores the embedded model
# gains 1.09 times at 2,304 tokens and 1.85 times at 8,064 (docs/results.md). On an H200 a step of Wan2.1-1.3B gains
# 1.84 times at 32,760 (benchmarks/results/h200/steps.jsonl). An image of 2048x2048 has 16,384; none was measured.
GAINS_FROM = {(True, False): 8_000, (False, False): 8_000, (True, True): 30_000, (False, True): 16_000}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a level is chosen for.

    Args:
        family: its name.
        models: names of the pipeline, of its transformer and of its codec's class.
        video: whether the model makes videos.
        tokens: visual tokens of a call.
        steps: denoising steps; None if unknown, which is taken for many.
        gpu: whether the transformer runs on a GPU.
    """

    family: str
    models: tuple[str, ...]
    video: bool
    tokens: int
    steps: int | None
    gpu: bool

    @property
    def long(self) -> bool:
        """Whether sparse attention gains at this length."""
        return self.tokens >= GAINS_FROM[self.video, self.gpu]

    @property
    def many_steps(self) -> bool:
        """Whether a step can be left out."""
        return self.steps is None or self.steps > FEW

    def __str__(self) -> str:
        steps = "an unknown number of" if self.steps is None else str(self.steps)
        return f"{self.tokens:,} tokens, {steps} steps, {'a GPU' if self.gpu else 'a CPU'}"


@dataclasses.dataclass(frozen=True)
class LevelRow:
    """The settings of a level in some cases.

    Args:
        level: one of `LEVELS`.
        setting: text that `Setting.parse` reads.
        source: where the settings come from.
        gain: what was measured or published of them, such as "2.8 times as fast as dense"; empty without a figure.
        models: a regular expression that one of the case's models matches; empty: all do.
        long: of long sequences, of short ones, or None: of both.
        steps: of the runs that it is for; None: of any.
    """

    level: str
    setting: str
    source: str
    gain: str = ""
    models: str = ""
    long: bool | None = None
    steps: int | None = None

    def fits(self, level: str, case: Case) -> bool:
        """Whether the row is for that level in that case, whose steps are many."""
        named = not self.models or is_named(self.models, case.models)
        return self.level == level and named and self.long in (None, case.long) and self.steps in (None, case.steps)


def is_named(pattern: str, names: Iterable[str]) -> bool:
    """Whether a regular expression matches a model's name: of a repository, its folder or its snapshot in a cache."""
    return any(re.search(pattern, re.sub(r"(/snapshots/.*|/transformer)?/*$", "", name)) for name in names)


SOL = "sol dense_steps=0.2 dense_layers=1"
SOL_FAST = "sol:tau=1.5 dense_steps=0.2 dense_layers=1"
STACKED = "sparse part as for Sol-Attn (arXiv 2607.24027); cache and sparse part were not measured together"


def mag_rows(models: str, *published: tuple[str, float, int, float, str, str], ratios: str = "") -> list[LevelRow]:
    """Rows of a model with MagCache's settings: alone where sequences are short, behind `sol` where they are long.

    Args:
        models: as of `LevelRow`.
        published: level, threshold, most steps skipped in a row, share of the first steps that are computed, the model
            that these were published for, and their gain; "" where that is another model.
        ratios: the name of published ratios, where the model's name does not tell.
    """
    rows = []
    for level, threshold, skipped, first, of, gain in published:
        cache = f"cache=mag:threshold={threshold},max_skip_steps={skipped},retention_ratio={first}"
        cache += f",mag_ratios={ratios}" if ratios else ""
        source = f"MagCache (arXiv:2506.09045) for {of}"
        length = None if level == "faithful" else False
        rows.append(LevelRow(level, f"dense {cache}", source, gain, models, length))
        if level != "faithful":
            sparse = SOL if level == "balanced" else SOL_FAST
            rows.append(LevelRow(level, f"{sparse} {cache}", f"{source}; {STACKED}", "", models, long=True))
    return rows


DEMO = "BlockCodec"  # the class of the embedded model's codec
LISTED = "measured on the embedded model (docs/results.md): 12 steps, 8,064 tokens, 64 prompts, two cores"
FORECAST = ",reuse=output,damping=0.6"
DEMO_ROWS = [
    LevelRow(level, f"dense cache=steps:computed={steps}", LISTED, gain, DEMO, steps=12)
    for level, steps, gain in (
        ("faithful", f"0x1x3x6x10{FORECAST}", "2.4 times as fast as dense at 36.1 dB"),
        ("balanced", f"0x1x3x7{FORECAST}", "2.9 times as fast as dense at 33.6 dB"),
        ("fast", "0x1x4", "3.9 times as fast as dense at 29.5 dB"),
    )
]

SMALL_WAN, LARGE_WAN = "Wan2.1-T2V-1.3B at 480p", "Wan2.1-T2V-14B at 720p"
WAN_22, QWEN, FLUX = "Wan2.2-T2V-A14B at 480p", "Qwen-Image", "FLUX.1-dev"
FAMILY_ROWS: Mapping[str, list[LevelRow]] = {
    "wan": [
        *DEMO_ROWS,
        *mag_rows(
            r"Wan2\.1-T2V-1\.3B",
            ("faithful", 0.06, 2, 0.4, WAN_22, ""),
            ("balanced", 0.12, 2, 0.2, SMALL_WAN, "2.2 times as fast as dense"),
            ("fast", 0.12, 4, 0.2, SMALL_WAN, "2.8 times as fast as dense"),
        ),
        *mag_rows(
            r"Wan2\.1-T2V-14B",
            ("faithful", 0.06, 2, 0.4, WAN_22, ""),
            ("balanced", 0.12, 4, 0.2, SMALL_WAN, ""),
            ("fast", 0.24, 6, 0.2, LARGE_WAN, "2.8 times as fast as dense"),
        ),
        *mag_rows(
            r"Wan2\.1-I2V-14B-480P",
            ("faithful", 0.06, 2, 0.4, WAN_22, ""),
            ("balanced", 0.12, 4, 0.2, "Wan2.1-I2V-14B-480P", "2.8 times as fast as dense"),
            ("fast", 0.24, 6, 0.2, "Wan2.1-I2V-14B-480P", "3.0 times as fast as dense"),
        ),
        *mag_rows(
            r"Wan2\.1-I2V-14B-720P",
            ("faithful", 0.06, 2, 0.4, WAN_22, ""),
            ("balanced", 0.12, 4, 0.2, "Wan2.1-I2V-14B-720P", "2.6 times as fast as dense"),
            ("fast", 0.24, 6, 0.2, "Wan2.1-I2V-14B-720P", "3.0 times as fast as dense"),
        ),
        *mag_rows(
            r"Wan2\.1-VACE-1\.3B",
            ("faithful", 0.02, 3, 0.2, "Wan2.1-VACE-1.3B, whose speed was not published", ""),
            ("balanced", 0.12, 2, 0.2, SMALL_WAN, ""),
            ("fast", 0.12, 4, 0.2, SMALL_WAN, ""),
        ),
        *mag_rows(
            r"Wan2\.2-T2V-A14B",
            ("faithful", 0.06, 2, 0.4, WAN_22, "1.5 times as fast as dense"),
            ("balanced", 0.12, 2, 0.4, SMALL_WAN, ""),
            ("fast", 0.12, 4, 0.2, SMALL_WAN, ""),
        ),
        *mag_rows(
            r"Wan2\.2-I2V-A14B",
            ("faithful", 0.06, 2, 0.4, WAN_22, ""),
            ("balanced", 0.12, 2, 0.4, SMALL_WAN, ""),
            ("fast", 0.12, 4, 0.2, SMALL_WAN, ""),
        ),
        *mag_rows(
            r"Wan2\.2-TI2V-5B",
            ("faithful", 0.06, 2, 0.4, WAN_22, ""),
            ("balanced", 0.06, 2, 0.2, "Wan2.2-TI2V-5B, text to video at 720p", "2.0 times as fast as dense"),
            ("fast", 0.12, 2, 0.2, SMALL_WAN, ""),
            ratios="wan2.2-ti2v-5b-t2v",
        ),
    ],
    "hunyuan_video": mag_rows(
        "HunyuanVideo$",
        ("faithful", 0.06, 2, 0.4, WAN_22, ""),
        ("balanced", 0.12, 4, 0.2, "HunyuanVideo at 720p", "2.3 times as fast as dense"),
        ("fast", 0.24, 6, 0.2, "HunyuanVideo at 720p", "2.8 times as fast as dense"),
        ratios="hunyuan-video-720p",
    ),
    "framepack": mag_rows(
        "FramePackI2V_HY",
        ("faithful", 0.06, 2, 0.4, WAN_22, ""),
        ("balanced", 0.1, 3, 0.2, "FramePack", "2.1 times as fast as dense"),
        ("fast", 0.15, 4, 0.2, "FramePack", "2.3 times as fast as dense"),
    ),
    "flux": [
        *mag_rows(
            r"FLUX\.1-dev",
            ("faithful", 0.06, 2, 0.2, QWEN, ""),
            ("balanced", 0.12, 4, 0.2, SMALL_WAN, ""),
            ("fast", 0.24, 5, 0.1, FLUX, "2.8 times as fast as dense"),
        ),
        *mag_rows(
            r"FLUX\.1-Kontext-dev",
            ("faithful", 0.03, 2, 0.2, "Qwen-Image, with half of its threshold", ""),
            ("balanced", 0.05, 4, 0.2, "FLUX.1-Kontext-dev", "2.0 times as fast as dense"),
            ("fast", 0.24, 5, 0.1, FLUX, ""),
        ),
    ],
    "qwen_image": mag_rows(
        r"Qwen-Image(-Edit)?$",
        ("faithful", 0.06, 2, 0.2, QWEN, "1.5 times as fast as dense"),
        ("balanced", 0.12, 2, 0.2, SMALL_WAN, ""),
        ("fast", 0.12, 4, 0.2, SMALL_WAN, ""),
    ),
}

FIRST_BLOCK = "threshold of FirstBlockCache: general"
GENERAL = [
    LevelRow("faithful", "dense cache=first-block:threshold=0.05", f"{FIRST_BLOCK}, Diffusers' default"),
    LevelRow("balanced", "dense cache=first-block:threshold=0.1", FIRST_BLOCK, long=False),
    LevelRow("balanced", f"{SOL} cache=first-block:threshold=0.1", f"{FIRST_BLOCK}; {STACKED}", long=True),
    LevelRow("fast", "dense cache=first-block:threshold=0.2", FIRST_BLOCK, long=False),
    LevelRow("fast", f"{SOL_FAST} cache=first-block:threshold=0.2", f"{FIRST_BLOCK}; {STACKED}", long=True),
]
# of 2 to `FEW` steps: one of them is dense, and no cache may leave one out
FEW_STEPS = [
    LevelRow(level, f"sol{tau} dense_steps=1 dense_layers=1", "sparse part as for Sol-Attn, one dense step")
    for level, tau in (("faithful", ":tau=0.5"), ("balanced", ""), ("fast", ":tau=1.5"))
]
NOTHING = "dense"


def choose(level: str, case: Case) -> LevelRow:
    """The row of a level in a case. Its source says so if it was not measured on the case's family."""
    if case.many_steps:
        for row in FAMILY_ROWS.get(case.family, ()):
            if row.fits(level, case):
                return row
        rows = [row for row in GENERAL if row.fits(level, case)]
    elif case.long and case.steps != 1:
        rows = [row for row in FEW_STEPS if row.fits(level, case)]
    else:
        source = (
            f"a run of {FEW} steps or fewer leaves none out, and sparse attention gains only in 2 steps or more on "
            f"{GAINS_FROM[case.video, case.gpu]:,} tokens or more"
        )
        return LevelRow(level, NOTHING, source)
    (row,) = rows
    return dataclasses.replace(row, source=f"{row.source}; not measured on the family {case.family}")
