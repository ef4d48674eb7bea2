"""`dit-accel doctor`: what would run here, and what is missing, with the command that installs it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dit_accel.cli import BROKEN, show_lines
from dit_accel.cli.options import JsonOptions, command
from dit_accel.errors import DitAccelError
from dit_accel.generation.provenance import free_memory
from dit_accel.generation.request import LOAD_FORM, DeviceOptions, SourceOptions
from dit_accel.generation.weights import weight_bytes
from dit_accel.values import option

if TYPE_CHECKING:
    import torch

    from dit_accel.generation.sources import Source

CHOSEN = 'what "auto" takes'
HEAD_DIM, BLOCK_Q, BLOCK_K = 128, 128, 64  # of the calls that are asked about: most models' heads, the usual blocks
# A module, what it is for, and how pip gets it.
PACKAGES = (
    ("triton", "Triton kernels on CUDA", "'triton; sys_platform == \"linux\"'"),
    ("peft", "--lora, training", "'dit_accel[lora]'"),
    ("yaml", "suites and recipes", "pyyaml"),
    ("torchmetrics", "metrics of eval", "torchmetrics"),
    ("imageio_ffmpeg", "mp4 files", "imageio-ffmpeg"),
    ("matplotlib", "pictures of plan, bench and eval", "'dit_accel[plot]'"),
    ("torch_fidelity", "fid and lpips by their published networks", "'dit_accel[eval-reference]'"),
    ("torchao", "--quantize, --keep-int8", "'dit_accel[quantize]'"),
    ("gguf", "--quantize gguf:FILE", "'dit_accel[quantize]'"),
    ("gradio", "serve", "'dit_accel[playground]'"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions(JsonOptions, SourceOptions, DeviceOptions):
    """What `dit-accel doctor` is asked."""

    model: str | None = option(  # type: ignore[assignment]
        None, "Also check whether a model fits: demo, a folder or a Hub id. Only its JSON files are read."
    )
    load: Path | None = option(
        None,
        "Also identify these weights, and check whether they fit --model. A repository is downloaded.",
        metavar=LOAD_FORM,
    )
    settings: tuple[str, ...] = option(
        (), "A setting that --load needs.", flag="--set", metavar="KEY=VALUE", repeatable=True
    )


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it would run here, which one or why not, and what command mends it."""

    subject: str
    works: bool
    detail: str
    remedy: str | None = None


@command(DoctorOptions)
def doctor(typed: dict[str, Any]) -> int:
    """Report what would run here, what is missing, and how to install it.

    The exit status is 1 if --model does not fit into memory, or --load cannot be used or does not fit --model.

    Example: dit-accel doctor --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    """
    from dit_accel.generation.setup import placement

    options = DoctorOptions(**typed)
    if options.revision is not None and options.model is None:
        raise DitAccelError(
            f"--revision {options.revision} goes with --model. Add --model ID, or leave out --revision."
        )
    if options.settings and options.load is None:
        raise DitAccelError(f"--set {options.settings[0]} goes with --load. Add --load FILE, or leave out --set.")
    device, dtype = placement(options.device, "auto", "none")
    kernels = _kernels(device, dtype)
    others = [_compiler(device), *(_package(*row) for row in PACKAGES)]
    checked = []
    if options.model is not None:
        checked.append(_memory(options.model, options.revision, device, dtype))
    if options.load is not None:
        checked.append(_weights(options.load, options.settings, options.model, options.revision))
    others += checked
    status = 0 if all(finding.works for finding in checked) else BROKEN
    if options.json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in (*kernels, *others)], indent=2))
        return status
    typer.echo(f"{device}, {str(dtype).removeprefix('torch.')}")
    for finding in (*kernels, *others):
        show_lines([f"  {'yes' if finding.works else 'no':4}{finding.subject}: {finding.detail}"], hang=4)
        if finding.remedy is not None:
            typer.echo(f"      {finding.remedy}")
    show_lines([_verdict(device, kernels, others)])
    return status


def _kernels(device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """Every implementation of every kernel, and which one "auto" takes for each."""
    from dit_accel.kernels import impls

    facts = impls.Facts(device, dtype, HEAD_DIM, BLOCK_Q, BLOCK_K, visual_blocks=64)
    findings = []
    for row in impls.rows():
        chosen, _ = impls.choose(facts, kernel=row.kernel)
        # first what no other dtype would mend
        obstacle = row.obstacle(dataclasses.replace(facts, dtype=row.dtypes[0])) or row.obstacle(facts)
        detail = obstacle or (CHOSEN if row is chosen else "runs only if you name it")
        findings.append(Finding(f"{row.kernel}, {row.name}", obstacle is None, detail))
    return findings


def _verdict(device: torch.device, kernels: Sequence[Finding], others: Sequence[Finding]) -> str:
    """One line: the processor, the implementations that "auto" takes, and what is not ready."""
    import torch

    chosen = (finding.subject.split(", ")[1] for finding in kernels if finding.detail == CHOSEN)
    names = " and ".join(dict.fromkeys(chosen))
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}: {names} kernels"
    else:
        machine = f"{device.type.upper()} only: everything runs, in {names}"
    lacking = ", ".join(finding.subject for finding in others if not finding.works)
    return f"{machine}; {f'not ready: {lacking}' if lacking else 'nothing missing'}"


def _compiler(device: torch.device) -> Finding:
    """What torch.compile needs: Triton on CUDA, a C++ compiler elsewhere."""
    if device.type == "cuda":
        works = importlib.util.find_spec("triton") is not None
        return Finding("torch.compile", works, "by Triton", None if works else "pip install triton")
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is not None:
        return Finding("torch.compile", True, f"by {compiler}")
    remedy = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    return Finding("torch.compile", False, "needs a C++ compiler", remedy)


def _package(module: str, purpose: str, wanted: str) -> Finding:
    works = importlib.util.find_spec(module) is not None
    return Finding(f"package {module}", works, f"for {purpose}", None if works else f"pip install {wanted}")


def _memory(model: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Finding:
    """The weights' size against the memory that is free; nothing but JSON files is read."""
    from dit_accel.generation import sources

    sizes = weight_bytes(sources.find(model, revision), dtype)
    total, free = sum(sizes.values()), free_memory(device)
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in sorted(sizes.items(), key=lambda part: -part[1]))
    detail = f"its weights take {_gigabytes(total)} ({parts}), and {_gigabytes(free)} are free on {device}"
    if total < free:
        return Finding(model, True, detail)
    if device.type == "cpu":
        return Finding(model, False, detail, "--dtype bfloat16")
    return Finding(model, False, detail, "--offload model" if max(sizes.values()) < free else "--offload group")


def _weights(path: Path, settings: tuple[str, ...], model: str | None, revision: str | None) -> Finding:
    """What --load would bring, and whether it fits the model; neither's weights are read."""
    from dit_accel.checkpoint import format as checkpoint
    from dit_accel.checkpoint import published, weight_files
    from dit_accel.generation import sources
    from dit_accel.generation.candidate import Candidate

    subject = f"weights {path}"
    try:
        candidate = Candidate.read(path, settings)
        parts = {} if model is None else transformers_of(sources.find(model, revision))
        if candidate.published is None and candidate.folder is not None:
            content = "a saved accelerator"
            if parts:
                checkpoint.check_identity(path, checkpoint.read(path).models, checkpoint.identify(parts))
        elif candidate.published is None:
            content = "a setting without weights"
        else:
            assert candidate.folder is not None
            files = weight_files.open_weights(candidate.folder, str(path))
            content = (
                f"{published.detect(files).name}, {sum(len(index.tensors) for index in files.models.values())} tensors"
            )
            if parts:
                published.fit(types.SimpleNamespace(components=parts), files, candidate.overrides)
    except DitAccelError as error:
        return Finding(subject, False, str(error))
    call = ", ".join(f"{name}={value}" for name, value in candidate.call.items())
    fits = f"; fits {model}" if model else ""
    return Finding(subject, True, f"{content}: {candidate.title}{f'; calls with {call}' if call else ''}{fits}")


def transformers_of(source: Source) -> dict[str, Any]:
    """The transformers of a model by component, without weights, from its JSON files alone."""
    import diffusers
    import torch

    transformers = {}
    for name in ("transformer", "transformer_2"):
        kind = source.component_class(name)
        if kind is not None and hasattr(diffusers, kind):
            cls = getattr(diffusers, kind)
            with torch.device("meta"):
                transformers[name] = cls.from_config(source.config(name))
    return transformers


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
