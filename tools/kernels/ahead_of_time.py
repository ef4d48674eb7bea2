"""Compile every Triton kernel for GPUs that need not be present, and print the resources of each build.

    python -m tools.kernels.ahead_of_time [--arch 90 ...] [--kernel NAME ...] [--all|--few] [--loops] [--record FILE]

For each kernel, builds are chosen until every pair of settings occurs in one of them; the architecture is a setting.
``--arch`` with one architecture covers the pairs there; ``--all`` compiles every combination, ``--few`` two a kernel.
``--record`` takes the rows of builds whose source has not changed from a file, and writes all rows to it.
The configurations are those of the table that the launcher and the autotuner read.

One JSON line a build: kernel, arch, dtype, config, registers, spill_bytes, spills_in_loops (instructions in loops that
access spilled registers), shared_bytes, instructions; for a kernel that multiplies also copies_left: for each loop that
copies tiles with `cp.async`, the copies that each wait leaves in flight. A configuration that the shared-memory rule
leaves out on an architecture has ``left_out``; one with an exception has ``allowed``, the reason. ``--loops`` adds
facts on each loop that multiplies matrices: its machine instructions, and the products that each wait for `wgmma`
leaves in flight.

The exit status is 1 if

* a forward kernel spills, or another one in a loop;
* a loop of a forward kernel waits for all copies, so none is in flight while it multiplies;
* a kernel needs more shared memory than its architecture has;
* 16-bit dots did not become matrix instructions;
* 8 warps write shared memory that another warp's `wgmma` may still read, as code of Triton before 3.9 may.

`EXCEPTIONS` lists the builds that may, with reasons.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from dit_accel.kernels.block_sparse.triton_configs import SHARED_BYTES
from dit_accel.kernels.jit import like_record
from tools.kernels.record import Record, key_of

ARCHS = (80, 89, 90, 100, 120)
CONSUMER = (86,)  # besides; only some kernels are compiled for it
DTYPES = ("fp16", "bf16")
POINTERS = {"fp16": "*fp16", "bf16": "*bf16"}
INSTRUCTIONS = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|cp\.async\.bulk|cp\.async(?!\.bulk)")
SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
SASS_BRANCH = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)")
SASS_END = re.compile(r"^\s*EXIT\b")
SASS_MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
SASS_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
SASS_COPY = re.compile(r"\bLDGSTS\b")
SASS_COPIED = re.compile(r"(?<!\.)\bDEPBAR\.LE SB0, 0x(\w+)")
SASS_LOCAL = re.compile(r"\b(LDL|STL)\b")
SASS_ORDER = re.compile(
    r"\b(?:(?P<product>HGMMA)|(?P<wait>WARPGROUP\.DEPBAR)|(?P<barrier>BAR\.)|(?P<write>LDGSTS|STSM?)\b)"
)
MATRIX = {"wgmma.mma_async", "tcgen05.mma", "mma.sync"}


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel in one configuration, before dtype and architecture.

    Args:
        kernel: name in reports.
        function: ``module:attribute`` of the jitted function.
        constants: its compile-time constants.
        pointers: types of arguments other than "i32", of records' members too. "data" is a pointer to the dtype, or the
            dtype within the type of a descriptor.
        warps, stages: launch settings.
        needs: bytes of shared memory in the launcher's rule.
        dots: whether the kernel multiplies matrices.
        registers: most registers of a thread; None: the compiler decides.
    """

    kernel: str
    function: str
    constants: tuple[tuple[str, Any], ...]
    pointers: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    needs: int
    dots: bool = True
    registers: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The settings that distinguish the kernel's builds."""
        chosen = {name.lower(): value for name, value in self.constants if name in CONFIG_KEYS}
        return {**chosen, "warps": self.warps, "stages": self.stages}

    def load(self) -> Any:
        """The jitted function."""
        module, attribute = self.function.split(":")
        return getattr(importlib.import_module(module), attribute)


class Allowed(NamedTuple):
    """What the builds of a kernel on some architectures and with some settings may do, and why.

    Args:
        archs: compute capabilities.
        settings: that the builds have.
        spill_bytes: most that they spill outside loops.
        drains: whether a loop may wait for all copies.
        unordered: whether writes of shared memory may follow a wait without a barrier of all warps.
    """

    kernel: str
    archs: tuple[int, ...]
    settings: dict[str, Any]
    reason: str
    spill_bytes: int = 0
    drains: bool = False
    unordered: bool = False


EXCEPTIONS = (
    Allowed("tail_forward", (100,), {"d": 64, "block_k": 32}, "two registers of blocks of 32 keys, outside loops", 8),
    Allowed(
        "sla_sums",
        (90,),
        {"warps": 8},
        "Triton 3.6 has no barrier there; the copies go to other buffers than those that products still read",
        unordered=True,
    ),
)
NOTHING = Allowed("", (), {}, "")
READER = pathlib.Path(__file__).read_text(encoding="utf-8")
WGMMA_ROWS = 64  # fewer rows of queries than this have no wgmma


def allowed(build: Build, arch: int) -> Allowed:
    """The exception for a build, or `NOTHING`."""
    exceptions = (
        entry
        for entry in EXCEPTIONS
        if entry.kernel == build.kernel and arch in entry.archs and entry.settings.items() <= build.config.items()
    )
    return next(exceptions, NOTHING)


CONFIG_KEYS = (
    "BLOCK_Q", "BLOCK_K", "BLOCK", "D", "SCOPE", "MAP", "ROWS", "WIDTH", "TILE_Q", "TILE_K", "STEP", "HAS_TABLES",
    "HAS_GRAD_LSE", "CELLS", "UNIT", "HAS_THRESHOLD", "HAS_COUNT", "HAS_SHARE", "SHARE", "HAS_GUARD", "HAS_FORCED",
)  # fmt: skip
DERIVED = ("step", "warps", "rows", "tile_k")  # these follow from the architecture, the blocks and the head dimension


def all_builds(arch: int) -> Iterator[Build]:
    """The builds of all kernels for an architecture, such as 90: the modules beside this one declare them.

    A module with `ARCHS` of its own has builds for those alone, else for `ARCHS` of this one.
    """
    for file in sorted(pathlib.Path(__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"tools.kernels.{file.stem}")
        if hasattr(module, "builds") and arch in getattr(module, "ARCHS", ARCHS):
            yield from module.builds(arch)


def covering(jobs: Sequence[tuple[Build, int, str]]) -> list[tuple[Build, int, str]]:
    """Some builds, architectures and dtypes of one kernel that hold every pair of settings of all of them.

    Greedy: the next one is the first with the most missing pairs.
    """

    def pairs(job: tuple[Build, int, str]) -> set[tuple[Any, ...]]:
        build, arch, dtype = job
        free = {name: value for name, value in build.config.items() if name not in DERIVED}
        return set(itertools.combinations(sorted({**free, "dtype": dtype, "arch": arch}.items()), 2))

    held = {job: pairs(job) for job in jobs}
    missing = set().union(*held.values())
    chosen = []
    while missing:
        best = max(jobs, key=lambda job: len(held[job] & missing))
        chosen.append(best)
        missing -= held[best]
    return chosen


def few(jobs: Sequence[tuple[Build, int, str]], number: int) -> list[tuple[Build, int, str]]:
    """Builds of one kernel for a second compiler: with the most warps on 9.0, and one on another architecture.

    `number` of the kernel: architectures and dtypes take turns.
    """
    others = sorted({job[1] for job in jobs} - {90}) or [90]
    hopper = [job for job in jobs if job[1] == 90]
    other = [job for job in jobs if job[1] == others[number % len(others)] != 90]
    return sorted(hopper, key=lambda job: job[0].warps)[-1:] + other[-(number % 2) :][:1]


def source_of(build: Build, arch: int, dtype: str) -> tuple[Any, dict[str, Any], str]:
    """What Triton compiles, the compiler's options, and the key of `record.Record`."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = build.load()
    constants, pointers = dict(build.constants), dict(build.pointers)
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values: dict[str, Any] = {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
            continue
        signature[name] = _typed(pointers.get(name, "i32"), dtype)
        attributes |= {(index, *path): [["tt.divisibility", 16]] for path in _pointers(signature[name])}
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True}
    if build.registers is not None:
        options["maxnreg"] = build.registers
    kind = GluonASTSource if function.is_gluon() else ASTSource
    source = kind(function, signature, constexprs=values, attrs=attributes)
    return source, options, key_of(metadata.version("triton"), source, options, arch, READER)


def compile_build(build: Build, arch: int, dtype: str, loops: bool = False) -> dict[str, Any]:
    """Compile a build and read its resources, with `loops` those of its loops too; see `loops_of`."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options, _ = source_of(build, arch, dtype)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = _dump(compiled.asm["cubin"], "-res-usage", *(["-sass"] if build.dots or loops else []))
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    row = {
        "kernel": build.kernel,
        "arch": f"sm_{arch}",
        "dtype": dtype,
        "config": build.config,
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "spills_in_loops": 0,
        "shared_bytes": compiled.metadata.shared,
        "instructions": sorted(set(INSTRUCTIONS.findall(compiled.asm["ptx"]))),
    }
    if build.dots or loops:
        inner = loops_of(text)
        row["spills_in_loops"] = sum(bool(SASS_LOCAL.search(line)) for loop in inner for line in loop)
        copying = [loop for loop in inner if any(map(SASS_COPY.search, loop))]
        row |= {"copies_left": [_numbers(SASS_COPIED, loop) for loop in copying]}
        row |= {"unordered": unordered_writes(text) if arch == 90 and build.warps == 8 else []}
        if loops:
            row |= {"loops": [len(loop) for loop in inner], "waits": [_numbers(SASS_WAIT, loop) for loop in inner]}
    return row


def _typed(kind: Any, dtype: str) -> Any:
    """Triton's type of an argument, or a record of its members' types."""
    if isinstance(kind, tuple):
        return like_record(kind, tuple(_typed(member, dtype) for member in kind))
    return POINTERS[dtype] if kind == "data" else kind.replace("<data[", f"<{dtype}[")


def _pointers(kind: Any) -> list[tuple[int, ...]]:
    """Where the pointers are in a type: paths through records."""
    if isinstance(kind, tuple):
        return [(i, *path) for i, member in enumerate(kind) for path in _pointers(member)]
    return [()] if kind.startswith("*") else []


def loops_of(sass: str) -> list[tuple[str, ...]]:
    """The instructions of each innermost loop that multiplies matrices, in the order of the code.

    A loop ends with a branch back to its start. Waits for barriers spin behind the kernel's end and branch over it.
    """
    places, lines = zip(*SASS_LINE.findall(sass), strict=True)
    number = {int(place, 16): i for i, place in enumerate(places)}
    loops: list[tuple[int, int]] = []
    for last, line in enumerate(lines):
        branch = SASS_BRANCH.search(line)
        first = number.get(int(branch[1], 16), last) if branch else last
        between = lines[first:last]
        if any(map(SASS_MATRIX.search, between)) and not any(map(SASS_END.search, between)):
            loops.append((first, last))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [lines[first : last + 1] for first, last in sorted(inner)]


def unordered_writes(sass: str) -> list[str]:
    """Writes of shared memory behind a wait for `wgmma` without a barrier of all warps between them.

    A wait holds for one group of 4 warps. Where 8 warps share a tile, the other group may still read it. Each loop is
    read twice, as if it ran twice. Code of Triton before 3.9 may have such writes (triton-lang/triton, issue 11047).
    """
    writes = []
    for lines in ([line for _, line in SASS_LINE.findall(sass)], *(2 * loop for loop in loops_of(sass))):
        pending = waited = False
        for line in lines:
            event = SASS_ORDER.search(line)
            kind = event.lastgroup if event else None
            if kind == "write" and waited:
                writes.append(line)
            if kind == "wait":
                pending, waited = False, waited or pending
            elif kind is not None:
                pending, waited = pending or kind == "product", waited and kind == "product"
    return sorted(set(writes))


def _numbers(pattern: re.Pattern[str], lines: Sequence[str]) -> list[int]:
    return [int(match[1], 16) for match in map(pattern.search, lines) if match]


def _dump(cubin: bytes, *options: str) -> str:
    """The output of Triton's `cuobjdump` for a binary; it finds the disassembler beside it."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        search = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        return subprocess.run(
            [tools / "cuobjdump", *options, path], capture_output=True, text=True, check=True, env=search
        ).stdout


def complaint(row: dict[str, Any], limit: int, dots: bool = True, may: Allowed = NOTHING) -> str | None:
    """Why a row fails the check, or None; `dots` is the build's."""
    forward = row["kernel"].endswith("forward")
    if row["shared_bytes"] > limit:
        return f"needs {row['shared_bytes']} bytes of shared memory, {row['arch']} has {limit}"
    if row["spills_in_loops"]:
        return f"spills {row['spill_bytes']} bytes, and accesses them {row['spills_in_loops']} times in loops"
    if forward and row["spill_bytes"] > may.spill_bytes:
        return f"spills {row['spill_bytes']} bytes"
    if forward and not may.drains and any(0 in left for left in row.get("copies_left", ())):
        return f"waits in a loop for all copies; the waits leave {row['copies_left']} in flight"
    if row.get("unordered") and not may.unordered:
        return f"writes shared memory that another warp group may read: {row['unordered'][0]}"
    if dots and not MATRIX & set(row["instructions"]):
        return "has no matrix instructions"
    wide = row.get("config", {}).get("block_q", WGMMA_ROWS) >= WGMMA_ROWS
    if dots and wide and row["arch"] == "sm_90" and "wgmma.mma_async" not in row["instructions"]:
        return "has no wgmma"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Print a row for each build; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=(*ARCHS, *CONSUMER), help="compute capabilities, such as 90"
    )
    parser.add_argument("--kernel", nargs="+", help="only kernels of these names")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--all", action="store_true", help="every combination of settings")
    parser.add_argument("--few", action="store_true", help="two builds a kernel: on 9.0, and on another in turn")
    parser.add_argument("--loops", action="store_true", help="count the instructions of loops, too")
    parser.add_argument("--record", type=pathlib.Path, help="take and keep the rows of unchanged builds in this file")
    options = parser.parse_args(arguments)
    if options.record and (options.loops or options.kernel or len(options.arch) + len(options.dtype) < 8):
        parser.error("--record is for all kernels, architectures and dtypes, without --loops. Leave it out.")
    jobs: list[tuple[Build, int, str]] = []
    failures = 0
    kernels: dict[str, list[tuple[Build, int, str]]] = {}
    for arch in options.arch:
        for build in all_builds(arch):
            if options.kernel and build.kernel not in options.kernel:
                continue
            if build.needs > SHARED_BYTES[arch]:
                reason = f"the shared-memory rule: {build.needs} bytes of {SHARED_BYTES[arch]}"
                row = {"kernel": build.kernel, "arch": f"sm_{arch}", "config": build.config, "left_out": reason}
                print(json.dumps(row))
                continue
            typed = {name for name, kind in build.pointers if "data" in str(kind)} & set(build.load().arg_names)
            dtypes = options.dtype if typed else options.dtype[:1]
            kernels.setdefault(build.kernel, []).extend((build, arch, dtype) for dtype in dtypes)
    for number, candidates in enumerate(kernels.values()):
        chosen = candidates if options.all else few(candidates, number) if options.few else covering(candidates)
        jobs += chosen
    version, keys = metadata.version("triton"), [source_of(*job)[2] for job in jobs]
    rows = Record(options.record).rows(version, keys, jobs, functools.partial(compile_build, loops=options.loops))
    for (build, arch, dtype), row in zip(jobs, rows, strict=True):
        may = allowed(build, arch)
        print(json.dumps(row | ({"allowed": may.reason} if may.reason else {})), flush=True)
        trouble = complaint(row, SHARED_BYTES[arch], build.dots, may)
        if trouble:
            failures += 1
            print(f"{build.kernel} sm_{arch} {dtype} {build.config}: {trouble}", file=sys.stderr)
    print(f"Triton {version}: {len(jobs)} builds, {failures} failed", file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
