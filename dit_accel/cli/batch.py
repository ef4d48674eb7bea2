"""`dit-accel generate --prompts`: an output for each prompt, shared out among processes and resumable.

An output is done when its record exists, which moves into place last. So a kill loses at most the output in progress,
and nothing is made twice. Processes do not communicate: each reserves an output while it makes it, first of its own
share of neighbouring prompts, then of what others have left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from dit_accel import values
from dit_accel.cli import Interrupted, job
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, check_ours, read_json, replace_file
from dit_accel.generation import prompts
from dit_accel.generation.processes import ProcessRank
from dit_accel.generation.request import GenerateRequest
from dit_accel.hooks.report import NOTHING_GAINED

DIGITS = 4  # of the number behind the name of an output


def _is_done(path: Path, request: GenerateRequest) -> bool:
    """Whether an output and its record exist. Those that were made with other options are refused."""
    record = path.with_suffix(".json")
    if not record.exists() or not path.exists() or path.stat().st_size == 0:
        return False
    recorded, present = _read_record(record).get("request", {}), json.loads(json.dumps(values.record(request)))
    for field in (field for field in dataclasses.fields(request) if field.name != "overwrite"):
        was, now = recorded.get(field.name), present[field.name]
        if was != now:
            if request.overwrite:
                return False
            raise DitAccelError(
                f"{record} was made {_as_typed(field, was)}, not {_as_typed(field, now)}. Choose another --output, or "
                "replace the old outputs with --overwrite."
            )
    return True


def _as_typed(field: dataclasses.Field[Any], value: Any) -> str:
    """An option with its value from a record, as on the command line, or that it is left out."""
    flag = values.flag(field)
    if value is None or value is False or value == []:
        return f"without {flag}"
    if value is True:
        return f"with {flag}"
    parts = value if isinstance(value, list) else [value]
    if not field.metadata["option"].repeatable:
        parts = [",".join(map(str, parts))]
    return f"with {' '.join(f'{flag} {part}' for part in parts)}"


def _read_record(path: Path) -> dict[str, Any]:
    return read_json(path, "record of an output", "Remove it, or choose another --output.")


def _comparison(path: Path) -> str:
    """The times and the likeness of an output and the dense one, in one line."""
    record = _read_record(path.with_suffix(".json"))
    dense, accelerated = (f"{record['runs'][name]['seconds']:.2f} s" for name in ("dense", "accelerated"))
    return f"{accelerated}, dense {dense}, {job.likeness(record['comparison'])}"


def run(request: GenerateRequest) -> None:
    """Make this process's share of the missing outputs, and what others leave of theirs; at the end all are there."""
    process = ProcessRank.here()
    prepared = job.prepare(dataclasses.replace(request, device=process.device(request.device)))
    assert request.prompts is not None
    outputs = {}
    for index, text in enumerate(prompts.read(request.prompts).texts):
        path = prepared.output.with_name(f"{prepared.output.stem}-{index:0{DIGITS}d}{prepared.output.suffix}")
        outputs[path] = dataclasses.replace(request, prompts=None, prompt=text, output=path)
    manifest = prepared.output.with_suffix(".jsonl")
    check_ours([manifest])
    job.check_outputs(outputs, dataclasses.replace(request, overwrite=True))

    def missing(path: Path) -> bool:
        return not _is_done(path, outputs[path])

    pending = list(filter(missing, process.share(list(outputs))))
    _write_manifest(manifest, outputs)
    share = f", process {process.index} of {process.count}" if process.count > 1 else ""
    typer.echo(f"{len(pending)} of {len(outputs)} prompts to do{share}")
    if pending and prepared.unused:
        typer.echo(prepared.unused, err=True)
    pipe, count = None, 0
    try:
        with contextlib.closing(process.claim(list(outputs), lambda path: path, missing)) as claimed:
            for path in claimed:
                pipe = prepared.load() if pipe is None else pipe
                prompt = outputs[path].prompt
                if warning := prepared.warning(prompt):
                    typer.echo(f"{path}: {warning}", err=True)
                lines = prepared.make(pipe, outputs[path], warm=count > 0)
                if lines[-1] == NOTHING_GAINED:
                    typer.echo(f"{path}: {NOTHING_GAINED}", err=True)
                count += 1
                _write_manifest(manifest, outputs)
                typer.echo(f"{path}: {prompt}")
                if request.compare:
                    typer.echo(f"{path}: {_comparison(path)}")
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted after {count} of {len(pending)}. Run the same command to continue.") from stop
    _write_manifest(manifest, outputs)  # with what others have made since
    typer.echo(f"manifest: {manifest}")
    if prepared.hint:
        typer.echo(prepared.hint)


def _write_manifest(manifest: Path, outputs: Mapping[Path, GenerateRequest]) -> None:
    """List every prompt with its output, from the records.

    Another process may finish an output meanwhile, so each process writes until nothing is new. The last one to write
    then has listed everything.
    """
    written = None
    while written != (records := [path.with_suffix(".json").exists() for path in outputs]):
        lines = []
        for index, ((path, request), done) in enumerate(zip(outputs.items(), records, strict=True)):
            entry = {"index": index, "prompt": request.prompt, "output": path.name, "done": done, "note": MARK}
            if done:
                record = path.with_suffix(".json")
                content = _read_record(record)
                entry |= {"record": record.name, "seconds": content["runs"]["accelerated"]["seconds"]}
                if request.compare:
                    entry |= {"dense_seconds": content["runs"]["dense"]["seconds"], **content["comparison"]}
            lines.append(json.dumps(entry) + "\n")
        replace_file(manifest, "".join(lines).encode())
        written = records
