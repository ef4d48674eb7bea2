"""Compile every Triton kernel for GPUs that need not be present, and print the resources of each build.

    python -m dit_accel.kernels.ahead_of_time [--arch 90 ...] [--kernel NAME ...] [--all] [--loops]

For each kernel and architecture, builds are chosen until every pair of settings occurs in one of them. ``--all``
compiles every combination. The configurations are those of the table that the launcher and the autotuner read.

One JSON line a build: kernel, arch, dtype, config, registers, spill_bytes, spills_in_loops (instructions in loops that
access spilled registers), shared_bytes, instructions. A configuration that the shared-memory rule leaves out on an
architecture has ``left_out``. ``--loops`` adds facts on each loop that multiplies matrices: its machine instructions,
and the products that each wait for `wgmma` leaves in flight.

The exit status is 1 if

* a forward kernel spills in a loop, or more outside than its build allows; another one spills more in a loop than that;
* a kernel needs more shared memory than its architecture has;
* 16-bit dots did not become matrix instructions.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
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
from typing import Any, NamedTuple

# Shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, table of capabilities).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHS = (80, 89, 90, 100, 120)
DTYPES = ("fp16", "bf16")
POINTERS = {"fp16": "*fp16", "bf16": "*bf16"}
INSTRUCTIONS = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|cp\.async\.bulk|cp\.async(?!\.bulk)")
SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
SASS_BRANCH = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)")
SASS_MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
SASS_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
SASS_LOCAL = re.compile(r"\b(LDL|STL)\b")
MATRIX = {"wgmma.mma_async", "tcgen05.mma", "mma.sync"}


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel in one configuration, before dtype and architecture.

    Args:
        kernel: name in reports.
        function: ``module:attribute`` of the jitted function.
        constants: its compile-time constants.
        pointers: types of arguments other than "i32". "data" is a pointer to the dtype, or the dtype within the type of
            a descriptor.
        warps, stages: launch settings.
        needs: bytes of shared memory in the launcher's rule.
        dots: whether the kernel multiplies matrices.
        spills: bytes that it may spill: a forward kernel outside its loops, others inside.
        registers: most registers of a thread; None: the compiler decides.
    """

    kernel: str
    function: str
    constants: tuple[tuple[str, Any], ...]
    pointers: tuple[tuple[str, str], ...]
    warps: int
    stages: int
    needs: int
    dots: bool = True
    spills: int = 0
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


CONFIG_KEYS = (
    "BLOCK_Q", "BLOCK_K", "BLOCK", "D", "SCOPE", "MAP", "ROWS", "WIDTH", "TILE_QT", "TILE_KT", "TILE_Q", "TILE_K",
    "STEP", "HAS_TABLES", "HAS_GRAD_LSE", "CELLS", "UNIT", "HAS_THRESHOLD", "HAS_COUNT", "HAS_SHARE", "HAS_GUARD",
    "HAS_FORCED",
)  # fmt: skip
DERIVED = ("step", "warps", "rows", "tile_kt")  # these follow from the architecture, the blocks and the head dimension


def all_builds(arch: int) -> Iterator[Build]:
    """The builds of all kernel folders for an architecture, such as 90: modules with `builds` declare them."""
    for file in sorted(pathlib.Path(__file__).parent.glob("*/*.py")):
        module = importlib.import_module(f"dit_accel.kernels.{file.parent.name}.{file.stem}")
        if hasattr(module, "builds"):
            yield from module.builds(arch)


def covering(jobs: Sequence[tuple[Build, str]]) -> list[tuple[Build, str]]:
    """Some builds and dtypes of one kernel that hold every pair of settings of all of them.

    Greedy: the next one is the first with the most missing pairs.
    """

    def pairs(job: tuple[Build, str]) -> set[tuple[Any, ...]]:
        build, dtype = job
        free = {name: value for name, value in build.config.items() if name not in DERIVED}
        return set(itertools.combinations(sorted({**free, "dtype": dtype}.items()), 2))

    held = {job: pairs(job) for job in jobs}
    missing = set().union(*held.values())
    chosen = []
    while missing:
        best = max(jobs, key=lambda job: len(held[job] & missing))
        chosen.append(best)
        missing -= held[best]
    return chosen


def compile_build(build: Build, arch: int, dtype: str, loops: bool = False) -> dict[str, Any]:
    """Compile a build and read its resources, with `loops` those of its loops too; see `loops_of`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = build.load()
    constants, pointers = dict(build.constants), dict(build.pointers)
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
            continue
        kind = pointers.get(name, "i32")
        signature[name] = POINTERS[dtype] if kind == "data" else kind.replace("<data[", f"<{dtype}[")
        if signature[name].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True}
    if build.registers is not None:
        options["maxnreg"] = build.registers
    source = GluonASTSource if function.is_gluon() else ASTSource
    compiled = triton.compile(
        source(function, signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", _dump(compiled.asm["cubin"], "-res-usage"))
    usage = {name: int(value) for name, value in found}
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
    if row["spill_bytes"] or loops:
        loop_facts = loops_of(compiled.asm["cubin"])
        row["spills_in_loops"] = sum(loop.spills for loop in loop_facts)
        if loops:
            row |= {"loops": [loop.instructions for loop in loop_facts], "waits": [loop.waits for loop in loop_facts]}
    return row


class LoopFacts(NamedTuple):
    """A loop's machine instructions, those that access spills, and the products that each wait leaves in flight."""

    instructions: int
    spills: int
    waits: list[int]


def loops_of(cubin: bytes) -> list[LoopFacts]:
    """Each innermost loop that multiplies matrices, in the order of the code.

    A loop ends with a conditional branch back to its start. Waits for barriers spin behind the kernel's code and branch
    back without a condition.
    """
    places, lines = zip(*SASS_LINE.findall(_dump(cubin, "-sass")), strict=True)
    number = {int(place, 16): i for i, place in enumerate(places)}
    found: list[tuple[int, int]] = []
    for last, line in enumerate(lines):
        branch = SASS_BRANCH.search(line) if line.startswith("@") else None
        first = number.get(int(branch[1], 16), last) if branch else last
        if first < last and any(map(SASS_MATRIX.search, lines[first:last])):
            found.append((first, last))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [_facts(lines[first : last + 1]) for first, last in sorted(inner)]


def _facts(lines: Sequence[str]) -> LoopFacts:
    waits = [int(wait[1]) for wait in map(SASS_WAIT.search, lines) if wait]
    return LoopFacts(len(lines), sum(bool(SASS_LOCAL.search(line)) for line in lines), waits)


def _dump(cubin: bytes, option: str) -> str:
    """The output of Triton's `cuobjdump` for a binary; it finds the disassembler beside it."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        search = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        return subprocess.run(
            [tools / "cuobjdump", option, path], capture_output=True, text=True, check=True, env=search
        ).stdout


def complaint(row: dict[str, Any], limit: int, dots: bool = True, spills: int = 0) -> str | None:
    """Why a row fails the check, or None; `dots` and `spills` are the build's."""
    if row["shared_bytes"] > limit:
        return f"needs {row['shared_bytes']} bytes of shared memory, {row['arch']} has {limit}"
    if row["kernel"].endswith("forward") and (row["spill_bytes"] > spills or row["spills_in_loops"]):
        return f"spills {row['spill_bytes']} bytes"
    if row["spills_in_loops"] and row["spill_bytes"] > spills:
        return f"spills {row['spill_bytes']} bytes, and accesses them {row['spills_in_loops']} times in loops"
    if dots and not MATRIX & set(row["instructions"]):
        return "has no matrix instructions"
    if dots and row["arch"] == "sm_90" and "wgmma.mma_async" not in row["instructions"]:
        return "has no wgmma"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Print a row for each build; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, such as 90")
    parser.add_argument("--kernel", nargs="+", help="only kernels of these names")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--all", action="store_true", help="every combination of settings")
    parser.add_argument("--loops", action="store_true", help="count the instructions of loops, too")
    options = parser.parse_args(arguments)
    jobs: list[tuple[Build, int, str, bool]] = []
    failures = 0
    for arch in options.arch:
        kernels: dict[str, list[tuple[Build, str]]] = {}
        for build in all_builds(arch):
            if options.kernel and build.kernel not in options.kernel:
                continue
            if build.needs > SHARED_BYTES[arch]:
                reason = f"the shared-memory rule: {build.needs} bytes of {SHARED_BYTES[arch]}"
                row = {"kernel": build.kernel, "arch": f"sm_{arch}", "config": build.config, "left_out": reason}
                print(json.dumps(row))
                continue
            typed = {name for name, kind in build.pointers if "data" in kind} & set(build.load().arg_names)
            dtypes = options.dtype if typed else options.dtype[:1]
            kernels.setdefault(build.kernel, []).extend((build, dtype) for dtype in dtypes)
        for candidates in kernels.values():
            chosen = candidates if options.all else covering(candidates)
            jobs += [(build, arch, dtype, options.loops) for build, dtype in chosen]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(compile_build, *zip(*jobs, strict=True), chunksize=4)
        for (build, arch, dtype, _), row in zip(jobs, rows, strict=True):
            print(json.dumps(row), flush=True)
            trouble = complaint(row, SHARED_BYTES[arch], build.dots, build.spills)
            if trouble:
                failures += 1
                print(f"{build.kernel} sm_{arch} {dtype} {build.config}: {trouble}", file=sys.stderr)
    print(f"{len(jobs)} builds, {failures} failed", file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
