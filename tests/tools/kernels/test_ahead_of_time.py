"""Ahead-of-time compilation: the declared builds are the launcher's, and a row says what the compiler made."""

import importlib
import itertools
import json
import os
import pathlib
import re

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse import triton_configs
from tools.kernels import ahead_of_time
from tools.kernels import block_sparse as declared

native = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces what would be compiled"
)


@pytest.mark.parametrize("arch", ahead_of_time.ARCHS)
def test_the_builds_are_the_launchers_own_table(arch):
    limit = ahead_of_time.SHARED_BYTES[arch]
    names = ("BLOCK_Q", "BLOCK_K", "D", "STEP")
    compiled = {
        (build.kernel, *(dict(build.constants)[name] for name in names), build.warps, build.stages)
        for build in ahead_of_time.all_builds(arch)
        if build.kernel.startswith("block_sparse_") and build.dots and build.needs <= limit
    }
    launched = {
        (f"block_sparse_{kernel}", *blocks, dim, launch.step, launch.warps, launch.stages)
        for kernel in triton_configs.KERNELS
        for blocks in declared.BLOCKS
        if declared.compiled(kernel, blocks[1])
        for dim in declared.HEAD_DIMS
        for launch in triton_configs.fitting(kernel, *blocks, dim, 2, arch)
    }
    assert compiled == launched


@pytest.mark.parametrize("capability", ahead_of_time.ARCHS)
def test_default_blocks_fit_everywhere(capability):
    for kernel in triton_configs.KERNELS:
        for blocks in ((64, 64), (128, 64)):
            for dim in declared.HEAD_DIMS:
                assert triton_configs.fitting(kernel, *blocks, dim, 2, capability)


def test_every_pair_of_settings_is_compiled():
    kernels = {}
    for arch in ahead_of_time.ARCHS:
        for build in ahead_of_time.all_builds(arch):
            kernels.setdefault(build.kernel, []).extend((build, arch, dtype) for dtype in ahead_of_time.DTYPES)

    def pairs(jobs):
        settings = [
            {name: value for name, value in build.config.items() if name not in ahead_of_time.DERIVED}
            | {"arch": arch, "dtype": dtype}
            for build, arch, dtype in jobs
        ]
        return {pair for setting in settings for pair in itertools.combinations(sorted(setting.items()), 2)}

    chosen = {name: ahead_of_time.covering(candidates) for name, candidates in kernels.items()}
    assert sum(map(len, chosen.values())) < 0.3 * sum(map(len, kernels.values()))
    for name, candidates in kernels.items():
        assert pairs(chosen[name]) == pairs(candidates) and set(chosen[name]) <= set(candidates)


@native
@pytest.mark.parametrize(("arch", "product"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_a_row_says_what_the_compiler_made(arch, product):
    build = next(b for b in ahead_of_time.all_builds(arch) if b.kernel == "block_sparse_forward")
    row = ahead_of_time.compile_build(build, arch, "bf16", loops=True)
    assert set(row) == {
        "kernel", "arch", "dtype", "config", "registers", "spill_bytes", "spills_in_loops", "shared_bytes",
        "instructions", "copies_left", "unordered", "loops", "waits",
    }  # fmt: skip
    whole, partial, bounded = row["loops"]  # the kernel's three loops over key blocks
    assert 100 < whole < partial < bounded
    assert row["copies_left"] == [[4], [6], [4]]  # keys and values of two steps, and the words of partial blocks
    assert (row["arch"], row["dtype"], row["spill_bytes"], row["spills_in_loops"]) == (f"sm_{arch}", "bf16", 0, 0)
    assert product in row["instructions"]
    assert 0 < row["shared_bytes"] <= ahead_of_time.SHARED_BYTES[arch]
    assert ahead_of_time.complaint(row, ahead_of_time.SHARED_BYTES[arch]) is None
    json.dumps(row)


@native
def test_the_gluon_kernel_overlaps_weights_with_the_sum():
    """Each consumer's loop waits for the scores with the sum in flight, and computes the weights before it waits again.

    The assembler moves them behind that wait unless a branch keeps it from that (benchmarks/LOG.md).
    """
    pytest.importorskip("triton.experimental.gluon")
    build = next(b for b in ahead_of_time.all_builds(90) if b.kernel == "gluon_forward")
    module, name = build.function.split(":")
    assert getattr(importlib.import_module(module), name).is_gluon()
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ahead_of_time, "loops_of", lambda text, read=ahead_of_time.loops_of: texts.append(text) or read(text)
        )
        row = ahead_of_time.compile_build(build, 90, "bf16", loops=True)
    assert row["spill_bytes"] == 0
    assert row["waits"] == [[1, 0], [1, 0]]  # two consumers
    _, lines = zip(*ahead_of_time.SASS_LINE.findall(texts[0]), strict=True)
    events = [e for line in lines for e in re.findall(r"MUFU\.EX2|DEPBAR\.LE gsb0, 0x[01]", line)]
    at = [i for i, event in enumerate(events) if event.endswith("0x1")]
    for first in at:
        behind = events[first + 1 :]
        assert behind[: behind.index("DEPBAR.LE gsb0, 0x0")].count("MUFU.EX2") >= build.config["block_k"] // 2


def test_the_exceptions():
    may = [
        ahead_of_time.allowed(build, arch) for arch in ahead_of_time.ARCHS for build in ahead_of_time.all_builds(arch)
    ]
    assert all(allowed in may for allowed in ahead_of_time.EXCEPTIONS)  # none is stale by name or settings
    assert {
        (allowed.kernel, allowed.spill_bytes, allowed.drains, allowed.unordered) for allowed in may if allowed.reason
    } == {
        ("sla_sums", 0, False, True),
        ("tail_forward", 8, False, False),
    }


def test_complaints():
    row = {"kernel": "x_forward", "arch": "sm_90", "spill_bytes": 0, "spills_in_loops": 0, "shared_bytes": 9}
    good = row | {"instructions": ["wgmma.mma_async"], "copies_left": [[2], [1, 4]], "unordered": []}
    spilled = ahead_of_time.NOTHING._replace(spill_bytes=8)
    assert ahead_of_time.complaint(good, 9) is None
    assert "spills 8" in ahead_of_time.complaint(good | {"spill_bytes": 8}, 9)
    assert ahead_of_time.complaint(good | {"spill_bytes": 8}, 9, may=spilled) is None
    assert "spills 9" in ahead_of_time.complaint(good | {"spill_bytes": 9}, 9, may=spilled)
    assert "in loops" in ahead_of_time.complaint(good | {"spill_bytes": 8, "spills_in_loops": 1}, 9, may=spilled)
    outside = good | {"spill_bytes": 8, "kernel": "x_dq"}
    assert ahead_of_time.complaint(outside, 9) is None
    assert "2 times in loops" in ahead_of_time.complaint(outside | {"spills_in_loops": 2}, 9)
    drained = good | {"copies_left": [[2], [4, 0]]}
    assert "waits in a loop for all copies" in ahead_of_time.complaint(drained, 9)
    assert ahead_of_time.complaint(drained, 9, may=ahead_of_time.NOTHING._replace(drains=True)) is None
    assert ahead_of_time.complaint(drained | {"kernel": "x_dq"}, 9) is None
    assert "another warp group" in ahead_of_time.complaint(good | {"unordered": ["STS [R1], R2 "]}, 9)
    assert "shared memory" in ahead_of_time.complaint(good, 8)
    assert "matrix" in ahead_of_time.complaint(row | {"instructions": ["cp.async"]}, 9)
    assert "wgmma" in ahead_of_time.complaint(row | {"instructions": ["mma.sync"]}, 9)


def sass(*lines):
    return "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))


PRODUCT, WAIT = "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
BARRIER, WRITE = "BAR.SYNC.DEFER_BLOCKING 0x0", "LDGSTS.E.BYPASS.128 [R2], [R4.64]"


@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        pytest.param((PRODUCT, WAIT, BARRIER, WRITE), 0, id="barrier"),
        pytest.param((PRODUCT, WAIT, WRITE), 1, id="no barrier"),
        pytest.param((PRODUCT, BARRIER, WAIT, "STS.128 [R1], R4"), 1, id="barrier before the wait"),
        pytest.param((WAIT, WRITE, PRODUCT), 0, id="nothing multiplied yet"),
        pytest.param((WRITE, BARRIER, PRODUCT, WAIT, "@P0 BRA 0x0", "EXIT"), 1, id="the next round writes"),
        pytest.param((BARRIER, WRITE, PRODUCT, WAIT, "@P0 BRA 0x0", "EXIT"), 0, id="the next round waits"),
    ],
)
def test_writes_of_shared_memory_that_another_warp_group_may_read(lines, bad):
    """8 warps share tiles; code of Triton before 3.9 may lack the barrier (triton-lang/triton, issue 11047)."""
    assert len(ahead_of_time.unordered_writes(sass(*lines))) == bad


def test_loops_end_with_a_branch_back_not_with_the_spinning_of_a_wait():
    loop = (PRODUCT, "@!P0 BRA 0x30", "BRA 0x0", "EXIT", "BRA 0x0")
    assert [len(lines) for lines in ahead_of_time.loops_of(sass(*loop))] == [3]


@pytest.mark.parametrize(
    ("dtype", "dim", "blocks", "words"),
    [
        (torch.float64, 64, (64, 64), "float64"),
        (torch.float16, 320, (64, 64), "320"),
        (torch.float16, 64, (96, 64), "query blocks"),
        (torch.float16, 64, (64, 384), "key blocks"),
        (torch.bfloat16, 40, (16, 128), None),
    ],
)
def test_limits_are_said(dtype, dim, blocks, words):
    reason = impls.named("triton").obstacle(impls.Facts(torch.device("cuda"), dtype, dim, *blocks))
    assert reason is None if words is None else words in reason


def test_few_builds_hold_every_kernel():
    """Each kernel on 9.0 with the most warps that it has there, and every other architecture for some of them."""
    jobs = {}
    for arch in ahead_of_time.ARCHS:
        for build in ahead_of_time.all_builds(arch):
            jobs.setdefault(build.kernel, []).append((build, arch, "bf16"))
    chosen = [ahead_of_time.few(job, number) for number, job in enumerate(jobs.values())]
    for every, builds in zip(jobs.values(), chosen, strict=True):
        most = max((build.warps for build, arch, _ in every if arch == 90), default=None)
        assert [build.warps for build, arch, _ in builds if arch == 90] == ([] if most is None else [most])
        assert sum(arch != 90 for _, arch, _ in builds) == any(arch != 90 for _, arch, _ in every)
    assert {arch for builds in chosen for _, arch, _ in builds} == set(ahead_of_time.ARCHS)


def test_the_oldest_triton_is_the_floor_of_the_package():
    root = pathlib.Path(__file__).parents[3]
    floor = re.search(r'"triton>=([\d.]+);', (root / "pyproject.toml").read_text())[1]
    oldest = re.search(r"^OLDEST_TRITON := ([\d.]+)$", (root / "Makefile").read_text(), re.MULTILINE)[1]
    assert oldest.startswith(f"{floor}.")
