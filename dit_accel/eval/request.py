"""What an evaluation is asked; each field is an option of `dit-accel eval` and a key of a suite."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

from dit_accel.errors import DitAccelError
from dit_accel.generation.request import PROMPTS_FORM, ModelRequest
from dit_accel.values import option

MOST_SEEDS = 10_000  # each is a sample of every method and prompt


def parse_seeds(text: str) -> tuple[int, ...]:
    """Numbers and spans of numbers with commas between them."""
    spans: list[range] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if span is None or (span[2] and int(span[2]) < int(span[1])):
            raise DitAccelError(f"--seeds takes numbers and spans, such as 0,1,2 or 0-3; got {text!r}.")
        spans.append(range(int(span[1]), int(span[2] or span[1]) + 1))
    count = sum(span.stop - span.start for span in spans)  # len() ends at 2**63
    if count > MOST_SEEDS:
        raise DitAccelError(f"--seeds {text} is {count:,} seeds, but an evaluation takes at most {MOST_SEEDS:,}.")
    return tuple(seed for span in spans for seed in span)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsRequest(ModelRequest):
    """A model, and the prompts and seeds of its samples."""

    prompts: str | None = option(
        None,
        "A file with a prompt a line, a built-in list (demo, general), or captioned images or videos.",
        metavar=PROMPTS_FORM,
    )
    seeds: tuple[int, ...] = option(
        (0,), "Seeds of the noise, such as 0,1,2 or 0-3.", metavar="N,N|N-N", parse=parse_seeds, least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRequest(PromptsRequest):
    """What `dit-accel eval` is asked; methods are `Candidate`s, and the command line has --method and --load.

    `published` are `Published` figures, which suites alone have.
    """

    methods: tuple[Any, ...] = ()
    published: tuple[Any, ...] = ()
    metrics: tuple[str, ...] = option(
        (),
        "Metric, such as psnr or fid[demo-clip], repeatable; by default all that can run.",
        flag="--metric",
        metavar="NAME[[NETWORK]]",
        repeatable=True,
    )
    real: Path | None = option(
        None, "Real images or videos for FID and KID; by default the dense outputs.", metavar="FOLDER"
    )
    require: str | None = option(
        None, "Limits, such as 'psnr>=25,speedup>=1.5'. If a result misses one, the exit status is 1.", metavar="LIMITS"
    )
    attention_report: str | None = option(
        None, "Also map each layer's error and kept mass at these steps.", metavar="steps=0,8,layers=all"
    )
    layout: Literal["vbench"] | None = option(
        None, "Also write the videos to OUTPUT/vbench, in the folders and with the names that VBench expects."
    )
    pictures: int = option(4, "Number of prompts to show in the report.", least=0)
    baselines: Path | None = option(
        None, "Dense outputs to share between evaluations; by default a folder in OUTPUT.", metavar="FOLDER"
    )
    output: Path = option(
        Path("evaluation"), "Folder for report.html, results.jsonl, summary.json and summary.md.", metavar="FOLDER"
    )
