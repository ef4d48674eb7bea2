"""`dit-accel generate --prompts`: an output for each prompt, shared out among processes, going on where it stopped.

The record beside an output says that it is done: it is moved into place last. So nothing is made twice or lost,
whichever process was killed when. Processes do not talk to each other: prompt i is for process i modulo their number.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import typer

from dit_accel.checkpoint import replace_file
from dit_accel.cli import job
from dit_accel.cli.job import Request
from dit_accel.errors import DitAccelError
from dit_accel.generation.output import stage_prefix

INTERRUPTED = 130
DIGITS = 4


@dataclasses.dataclass(frozen=True)
class Process:
    """This process among those that `accelerate launch` or `torchrun` started.

    Args:
        rank, count: its place among all of them.
        local_rank: its place on this machine; None where there is one process.
    """

    rank: int = 0
    count: int = 1
    local_rank: int | None = None

    @classmethod
    def here(cls) -> Process:
        """As the launcher's environment variables say.

        Raises:
            DitAccelError: RANK, WORLD_SIZE or LOCAL_RANK does not fit the others.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = {name: os.environ[name] for name in names if name in os.environ}
        if "WORLD_SIZE" not in given:
            return cls()
        if len(given) < 3 or not all(value.isdecimal() for value in given.values()):
            raise DitAccelError(
                f"A launcher sets {', '.join(names)} to integers, got {given}; unset them or all three."
            )
        rank, count, local = (int(given[name]) for name in names)
        if not rank < count:
            raise DitAccelError(f"RANK counts from 0 to WORLD_SIZE - 1, got RANK={rank} and WORLD_SIZE={count}.")
        return cls(rank, count, local if count > 1 else None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The requests of a prompt file, in its order.

    Args:
        requests: one for each prompt; each is what `generate --prompt` would have been asked for.
        manifest: the file that lists them.
    """

    requests: list[Request]
    manifest: Path

    def is_done(self, request: Request) -> bool:
        """Whether a request's record lies there.

        Raises:
            DitAccelError: it was made with other options.
        """
        path = record_of(request)
        if not path.exists():
            return False
        made, asked = _read(path).get("request", {}), request.record()
        for name in asked:
            if made.get(name) != asked[name]:
                raise DitAccelError(
                    f"{path} was made with {_option(name)} {made.get(name)}, not {asked[name]}: choose another "
                    "--output, or delete what was made."
                )
        return True

    def write_manifest(self) -> None:
        """List every prompt with what was made for it, from the records.

        Another process may finish an output between reading and writing; whoever renames last has read everything
        that was there, because all go on until nothing is new.
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


def run(request: Request) -> int:
    """Make this process's share of the outputs that are still missing.

    Returns:
        The exit status.

    Raises:
        DitAccelError: the prompts cannot be read, or something asked for cannot be done.
    """
    process = Process.here()
    batch = read(request, job.prepare(request).output)
    batch.manifest.parent.mkdir(parents=True, exist_ok=True)
    pending = [each for each in batch.requests[process.rank :: process.count] if not batch.is_done(each)]
    batch.write_manifest()
    share = f", process {process.rank} of {process.count}" if process.count > 1 else ""
    typer.echo(f"{len(pending)} of {len(batch.requests)} prompts to do{share}")
    if pending:
        loaded = job.prepare(request, process.local_rank).load()
    made = 0
    try:
        for each in pending:
            _clear(each)
            loaded.make(each)
            made += 1
            batch.write_manifest()
            typer.echo(f"{each.output}: {each.prompt}")
    except KeyboardInterrupt:
        typer.echo(f"dit-accel: interrupted after {made} of {len(pending)}; the same command goes on.", err=True)
        return INTERRUPTED
    typer.echo(f"manifest: {batch.manifest}")
    return 0


def read(request: Request, output: Path) -> Batch:
    """The requests of a prompt file: a prompt a line, empty lines left out.

    Raises:
        DitAccelError: the file cannot be read, or has no prompts.
    """
    assert request.prompts is not None
    try:
        text = request.prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DitAccelError(f"--prompts {request.prompts} cannot be read: {reason}.") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DitAccelError(f"--prompts {request.prompts} holds no prompts; write one a line.")
    paths = [output.with_name(f"{output.stem}-{i:0{DIGITS}d}{output.suffix}") for i in range(len(prompts))]
    requests = [
        dataclasses.replace(request, prompts=None, prompt=prompt, output=path)
        for prompt, path in zip(prompts, paths, strict=True)
    ]
    return Batch(requests, output.with_suffix(".jsonl"))


def _clear(request: Request) -> None:
    """Remove what a killed process left of this output; no other process works on it."""
    assert request.output is not None
    for left in request.output.parent.glob(f"{stage_prefix(request.output)}*"):
        shutil.rmtree(left)


def record_of(request: Request) -> Path:
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


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
