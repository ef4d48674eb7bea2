"""`dit-accel generate --prompts`: an output for each prompt, shared out among processes, going on where it stopped.

The record beside an output says that it is done: it is moved into place last. So nothing is made twice or lost,
whichever process was killed when. Processes do not talk to each other: each has a run of neighbouring prompts.
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
from dit_accel.files import replace_file
from dit_accel.generation import prompts
from dit_accel.generation.processes import ProcessRank
from dit_accel.generation.request import GenerateRequest

DIGITS = 4


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """The requests of many prompts, in their order.

    Args:
        requests: one for each prompt; each is what `generate --prompt` would have been asked for.
        manifest: the file that lists them.
        process: which of the processes this is.
    """

    requests: list[GenerateRequest]
    manifest: Path
    process: ProcessRank

    def pending(self) -> list[GenerateRequest]:
        """What is left of this process's share.

        Raises:
            DitAccelError: something was made with other options.
        """
        return [each for each in self.process.share(self.requests) if not self.is_done(each)]

    def is_done(self, request: GenerateRequest) -> bool:
        """Whether a request's record lies there.

        Raises:
            DitAccelError: it was made with other options.
        """
        path = record_of(request)
        if not path.exists():
            return False
        made, asked = _read(path).get("request", {}), json.loads(json.dumps(values.record(request)))
        for field in dataclasses.fields(request):
            was, now = made.get(field.name), asked[field.name]
            if was != now:
                raise DitAccelError(
                    f"{path} was made with {values.flag(field)} {was}, not {now}: choose another --output, or delete "
                    "what was made."
                )
        return True

    def write_manifest(self) -> None:
        """List every prompt with what was made for it, from the records.

        Another process may finish an output between reading and writing; whoever renames last has read everything
        that was there, because all go on until nothing is new.

        Raises:
            DitAccelError: it cannot be written.
        """
        written = None
        while written != (found := [record_of(request).exists() for request in self.requests]):
            lines = [json.dumps(self._entry(i, done)) for i, done in enumerate(found)]
            replace_file(self.manifest, ("\n".join(lines) + "\n").encode())
            written = found

    def _entry(self, index: int, done: bool) -> dict[str, Any]:
        request = self.requests[index]
        assert request.output is not None
        entry = {"index": index, "prompt": request.prompt, "output": request.output.name, "done": done}
        if done:
            run = _read(record_of(request))["runs"]["accelerated"]
            entry |= {"record": record_of(request).name, "seconds": run["seconds"]}
        return entry


def run(request: GenerateRequest) -> None:
    """Make this process's share of the outputs that are still missing.

    Raises:
        DitAccelError: the prompts cannot be read, or something asked for cannot be done.
        Interrupted: by Ctrl-C.
    """
    process = ProcessRank.here()
    prepared = job.prepare(dataclasses.replace(request, device=process.device(request.device)))
    batch = read(request, prepared.output, process)
    batch.manifest.parent.mkdir(parents=True, exist_ok=True)
    pending = batch.pending()
    batch.write_manifest()
    share = f", process {process.index} of {process.count}" if process.count > 1 else ""
    typer.echo(f"{len(pending)} of {len(batch.requests)} prompts to do{share}")
    made = 0
    try:
        loaded = prepared.load() if pending else None
        for each in pending:
            assert loaded is not None
            loaded.make(each)
            made += 1
            batch.write_manifest()
            typer.echo(f"{each.output}: {each.prompt}")
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted after {made} of {len(pending)}; the same command goes on.") from stop
    typer.echo(f"manifest: {batch.manifest}")


def read(request: GenerateRequest, output: Path, process: ProcessRank) -> PromptBatch:
    """The requests of `--prompts`.

    Raises:
        DitAccelError: the prompts cannot be read, or there are none.
    """
    assert request.prompts is not None
    texts = prompts.read(request.prompts).texts
    paths = [output.with_name(f"{output.stem}-{i:0{DIGITS}d}{output.suffix}") for i in range(len(texts))]
    requests = [
        dataclasses.replace(request, prompts=None, prompt=text, output=path)
        for text, path in zip(texts, paths, strict=True)
    ]
    return PromptBatch(requests, output.with_suffix(".jsonl"), process)


def record_of(request: GenerateRequest) -> Path:
    """Where the record of a request's output lies."""
    assert request.output is not None
    return request.output.with_suffix(".json")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DitAccelError(f"{path} should be the record of an output, and cannot be read ({error}).") from error
    if not isinstance(record, dict):
        raise DitAccelError(f"{path} should be the record of an output, and is not; choose another --output.")
    return record
