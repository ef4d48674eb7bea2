"""`dit-accel generate --prompts`: an output for each prompt, shared out among processes and resumable.

An output is done when its record exists, which moves into place last. So a kill loses at most the output in progress,
and nothing is made twice. Processes do not communicate; each has neighbouring prompts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import typer

from dit_accel import values
from dit_accel.cli import Interrupted, job
from dit_accel.errors import DitAccelError
from dit_accel.files import read_json, replace_file
from dit_accel.generation import prompts
from dit_accel.generation.processes import ProcessRank
from dit_accel.generation.request import GenerateRequest

DIGITS = 4  # of the number behind the name of an output


@dataclasses.dataclass(frozen=True)
class NumberedOutput:
    """The output of one prompt of many; `request` is that of `generate --prompt`."""

    request: GenerateRequest
    path: Path

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    def is_done(self) -> bool:
        """Whether the output and its record exist.

        Raises:
            DitAccelError: they were made with other options.
        """
        if not self.record.exists() or not self.path.exists() or self.path.stat().st_size == 0:
            return False
        made, asked = self.read_record().get("request", {}), json.loads(json.dumps(values.record(self.request)))
        for field in dataclasses.fields(self.request):
            was, now = made.get(field.name), asked[field.name]
            if was != now:
                raise DitAccelError(
                    f"{self.record} was made with {values.flag(field)} {was}, not {now}. Choose another --output, or "
                    "delete the old outputs."
                )
        return True

    def read_record(self) -> dict[str, Any]:
        """The record of the output; a damaged or other file is refused."""
        return read_json(self.record, "record of an output", "Remove it, or choose another --output.")


def run(request: GenerateRequest) -> None:
    """Make this process's share of the missing outputs.

    Raises:
        DitAccelError: the prompts cannot be read, or the request cannot be carried out.
        Interrupted: by Ctrl-C.
    """
    process = ProcessRank.here()
    prepared = job.prepare(dataclasses.replace(request, device=process.device(request.device)))
    assert request.prompts is not None
    outputs = []
    for index, text in enumerate(prompts.read(request.prompts).texts):
        path = prepared.output.with_name(f"{prepared.output.stem}-{index:0{DIGITS}d}{prepared.output.suffix}")
        outputs.append(NumberedOutput(dataclasses.replace(request, prompts=None, prompt=text, output=path), path))
    manifest = prepared.output.with_suffix(".jsonl")
    pending = [each for each in process.share(outputs) if not each.is_done()]
    _write_manifest(manifest, outputs)
    share = f", process {process.index} of {process.count}" if process.count > 1 else ""
    typer.echo(f"{len(pending)} of {len(outputs)} prompts to do{share}")
    made = 0
    try:
        pipe = prepared.load() if pending else None
        for each in pending:
            assert pipe is not None
            if warning := prepared.warning(each.request.prompt):
                typer.echo(f"{each.path}: {warning}", err=True)
            prepared.make(pipe, each.request)
            made += 1
            _write_manifest(manifest, outputs)
            typer.echo(f"{each.path}: {each.request.prompt}")
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted after {made} of {len(pending)}; the same command goes on.") from stop
    typer.echo(f"manifest: {manifest}")


def _write_manifest(path: Path, outputs: list[NumberedOutput]) -> None:
    """List every prompt with its output, from the records.

    Another process may finish an output meanwhile, so each process writes until nothing is new. The last one to write
    then has listed everything.
    """
    written = None
    while written != (found := [each.record.exists() for each in outputs]):
        lines = []
        for index, (each, done) in enumerate(zip(outputs, found, strict=True)):
            entry = {"index": index, "prompt": each.request.prompt, "output": each.path.name, "done": done}
            if done:
                entry |= {"record": each.record.name, "seconds": each.read_record()["runs"]["accelerated"]["seconds"]}
            lines.append(json.dumps(entry) + "\n")
        replace_file(path, "".join(lines).encode())
        written = found
