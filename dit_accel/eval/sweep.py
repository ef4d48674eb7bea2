"""The samples of an evaluation: the untouched pipeline and every method in turn, for each prompt and seed.

Methods take turns within a prompt, so that other load of the machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.eval.samples import Results, Row, Store, key_of
from dit_accel.files import read_json, replace_file
from dit_accel.generation import setup
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.provenance import ROOT
from dit_accel.generation.sampling import TotalBar, attention_time, progress_bar, sample

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from dit_accel.accelerator import Accelerator
    from dit_accel.hooks.report import Report

ABOVE = ("train", "eval", "bench", "tune", "cli")


@dataclasses.dataclass(frozen=True)
class PromptSeed:
    """A prompt and a seed."""

    prompt: str
    seed: int


@dataclasses.dataclass
class Sweep:
    """Generates the samples that are not there yet.

    Args:
        arguments_from: makes those of its call, without the prompt, from a method's defaults (`Candidate.call`).
        identity: what else decides the pixels: model, device, versions.
        results: the known rows; new ones are added to them.
        samples, baselines: where the frames of methods and of the baseline lie.
        compile: whether the transformers are compiled, so that a warm-up takes a whole loop.
    """

    pipe: DiffusionPipeline
    arguments_from: Callable[[Mapping[str, Any]], dict[str, Any]]
    identity: Mapping[str, Any]
    device: torch.device
    results: Results
    samples: Store
    baselines: Store
    compile: bool

    def __post_init__(self) -> None:
        self._code = code_hash()
        self._warm: set[str] = set()
        self._weights: dict[Path, str] = {}  # hashes of folders

    def key(self, candidate: Candidate, item: PromptSeed) -> str:
        """The name of a sample. Only a method's pixels depend on this package's own code."""
        identity = {"arguments": self.arguments(candidate), "prompt": item.prompt, "seed": item.seed, **self.identity}
        if candidate.setting is not None:
            folder, weights = candidate.folder, None
            if folder is not None:
                weights = self._weights.setdefault(folder, self._weights.get(folder) or folder_hash(folder))
            identity |= {"setting": candidate.record(), "weights": weights, "code": self._code}
        return key_of(identity)

    def arguments(self, candidate: Candidate) -> dict[str, Any]:
        """The arguments of the pipeline's call; a method's own defaults, such as steps, win over the model's."""
        return self.arguments_from(candidate.call)

    def steps(self, candidate: Candidate) -> int | None:
        """Denoising steps of its call; None if the pipeline has no usual number of them."""
        steps = setup.default_of(type(self.pipe), self.arguments(candidate), "num_inference_steps")
        return steps if isinstance(steps, int) else None

    def store(self, candidate: Candidate) -> Store:
        return self.baselines if candidate.setting is None else self.samples

    def run(
        self,
        candidates: Sequence[Candidate],
        items: Sequence[PromptSeed],
        whole: TotalBar | None = None,
        claimed: Iterable[PromptSeed] | None = None,
    ) -> None:
        """Make every sample that is not there, under one progress bar on stderr, which may be part of a whole.

        Args:
            claimed: those of the items that this process makes, one by one; all if not given.
        """
        numbers = {item: number * len(candidates) for number, item in enumerate(items)}
        total = len(numbers) * len(candidates)
        left = sum(not self.has([candidate], item) for item in numbers for candidate in candidates)
        with contextlib.ExitStack() as shown:
            progress, done, count = None if whole is None else whole.progress, None, 0
            for item in items if claimed is None else claimed:
                for number, candidate in enumerate(candidates, numbers[item] + 1):
                    key = self.key(candidate, item)
                    if self._is_there(candidate, key):
                        if whole is not None:
                            whole.spare(self.results.rows[key]["steps"])
                        continue
                    if progress is None:
                        progress = shown.enter_context(progress_bar())
                        done = progress.add_task("all samples", total=left)
                    row = self._make(candidate, item, key, f"{number}/{total} {candidate.label}", progress)
                    self.results.add(row)
                    count += 1
                    if done is not None:
                        progress.advance(done)
                    elif whole is not None:
                        whole.advance(row["steps"])
            if progress is not None and done is not None:
                progress.update(done, total=count)  # other processes made the rest

    def has(self, candidates: Sequence[Candidate], item: PromptSeed) -> bool:
        """Whether an item's samples are known and their files exist, which are not read."""
        keys = [(candidate, self.key(candidate, item)) for candidate in candidates]
        return all(key in self.results.rows and self.store(candidate).path(key).exists() for candidate, key in keys)

    def observe(
        self,
        candidate: Candidate,
        item: PromptSeed,
        subject: str,
        settings: dict[str, Any],
        record: Callable[[Accelerator, Callable[[], Any]], dict[str, Any]],
        folder: Path,
        whole: TotalBar | None = None,
    ) -> dict[str, Any]:
        """What `record` made of one run of a method, or what `folder` has of it.

        `record` gets the accelerator, and a function that makes the run once. `settings` decides it beside the sample.
        """
        path = folder / f"{key_of({'sample': self.key(candidate, item), **settings})}.json"
        if not path.exists():
            arguments, title = self.arguments(candidate) | {"prompt": item.prompt}, f"{subject} of {candidate.label}"
            bar = None if whole is None else whole.progress
            with candidate.apply(self.pipe) as accel:
                observed = record(accel, lambda: sample(self.pipe, arguments, item.seed, title, self.device, bar))
            replace_file(path, json.dumps(observed, allow_nan=False).encode())
        return read_json(path, f"record of {subject}", "Delete it and run again.")

    def _is_there(self, candidate: Candidate, key: str) -> bool:
        """Whether a sample needs no work: its row is known and its frames are whole, or the cache has both."""
        stored = self.store(candidate).find(key)
        known = self.results.rows.get(key)
        if known is not None and (stored is None or stored["sha256"] != known["sha256"]):
            print(
                f"{self.store(candidate).path(key)} is missing or damaged. Its sample is generated again.",
                file=sys.stderr,
            )
            return False
        if known is None and stored is not None and candidate.setting is None:
            # If a kill came before its line was written, its times are those of this evaluation too.
            self.results.add(stored | {"cached": not self.baselines.folder.is_relative_to(self.results.folder)})
            return True
        return known is not None

    def _make(self, candidate: Candidate, item: PromptSeed, key: str, title: str, progress: Progress) -> Row:
        arguments = self.arguments(candidate) | {"prompt": item.prompt}
        if candidate.label not in self._warm:
            self._warm.add(candidate.label)
            setup.warm_up(self.pipe, arguments, candidate, whole=self.compile)
        accel = None if candidate.setting is None else candidate.apply(self.pipe)
        try:
            if self.compile:
                output, attention = sample(self.pipe, arguments, item.seed, title, self.device, progress), None
            else:
                with attention_time(self.pipe, self.device) as watch:
                    output = sample(self.pipe, arguments, item.seed, title, self.device, progress)
                attention = watch.seconds
        finally:
            if accel is not None:
                accel.remove()
        row = {
            "key": key,
            "label": candidate.label,
            **candidate.record(),
            "prompt": item.prompt,
            "seed": item.seed,
            **output.record(),
            "attention_seconds": attention,
            **(_density(accel.report()) if accel is not None else {"density": 1.0}),
            "cached": False,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return self.store(candidate).write((output.frames * 255).round().astype("uint8"), row)


def _density(report: Report) -> dict[str, Any]:
    """Share of pairs attended over all self-attention calls (dense ones: 1), and the implementations that ran."""
    calls = report.sparse_calls + report.dense_calls
    sparse = sum(layer.sparse_calls * (layer.density or 0.0) for layer in report.layers)
    return {
        "density": (sparse + report.dense_calls) / calls if calls else 1.0,
        "sparse_calls": report.sparse_calls,
        "dense_calls": report.dense_calls,
        "kernels": sorted({kernel for layer in report.layers for kernel in layer.kernels}),
    }


def folder_hash(folder: Path) -> str:
    """A hash of a model's folder or file: text of JSON files; name, size and date of weights, which may be large."""
    parts: dict[str, Any] = {}
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            parts[name] = path.read_text(encoding="utf-8")
        elif path.suffix in (".safetensors", ".gguf", ".model", ".txt"):
            state = path.stat()
            parts[name] = [state.st_size, state.st_mtime_ns]
    return key_of(parts)


def code_hash() -> str:
    """A hash of the package's code that decides pixels: all but the folders above generation."""
    package = ROOT / "dit_accel"
    files = (path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] not in ABOVE)
    return key_of({path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in files})
