"""What earlier runs of `ahead_of_time` compiled, so that builds whose source has not changed are not compiled again."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def key_of(version: str, source: Any, options: dict[str, Any], arch: int, reader: str) -> str:
    """A digest of all that decides what a build compiles to, and how its row is read.

    Triton's hash of a source has the text of the kernel and of all that it calls, its constants, and the types and
    divisibility of its arguments. The assembler and the disassembler come with Triton.

    Args:
        version: Triton's.
        source: an `ASTSource`.
        options: of the compiler.
        reader: the text of the module that reads a build's resources.
    """
    content = json.dumps([version, source.hash(), sorted(options.items()), arch, reader])
    return hashlib.sha256(content.encode()).hexdigest()


class Record:
    """A file with a row for each build, of several versions of Triton; None: nothing is recorded."""

    def __init__(self, path: pathlib.Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self._entries = [json.loads(line) for line in lines]

    def rows(
        self, version: str, keys: Sequence[str], jobs: Sequence[tuple[Any, ...]], compile_job: Callable[..., Row]
    ) -> Iterator[Row]:
        """The row of each job, by its key from the file, else compiled. Afterwards the file has these of the version.

        Args:
            version: Triton's.
            compile_job: makes a row of a job's parts, in another process.
        """
        rows = {entry["key"]: entry["row"] for entry in self._entries}
        changed = [(key, job) for key, job in zip(keys, jobs, strict=True) if key not in rows]
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            compiled = {key: pool.submit(compile_job, *job) for key, job in changed}
            for key in keys:
                if key in compiled:
                    rows[key] = compiled[key].result()
                yield rows[key]
        print(f"{len(changed)} builds compiled, {len(jobs) - len(changed)} unchanged", file=sys.stderr)
        others = [entry for entry in self._entries if entry["triton"] != version]
        entries = [*others, *({"triton": version, "key": key, "row": rows[key]} for key in keys)]
        if self.path is not None:
            written = self.path.with_suffix(".new")  # an interrupted write leaves the old file whole
            written.write_text("".join(f"{line}\n" for line in sorted(map(json.dumps, entries))), encoding="utf-8")
            written.replace(self.path)
