"""Portable attention against dense SDPA on this machine's CPU: one JSON row per setting, numerics checked first.

    python benchmarks/portable.py --output benchmarks/results/portable-cpu.jsonl

The public call is timed, everything after the plan is cached included. Sparse and dense calls alternate, so that other
work on the machine meets both.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import dit_accel

GRID = dit_accel.TokenGrid(frames=8, height=32, width=32)
HEADS, HEAD_DIM = 4, 64
WINDOWS: tuple[dict[str, Any], ...] = (
    {"window": (8, 16, 16), "stride": (8, 16, 16)},
    {"window": (8, 16, 8), "stride": (8, 16, 8)},
    {"window": (8, 8, 8), "stride": (8, 8, 8)},
    {"window": (4, 16, 16), "stride": 1},
)
CHECKED_QUERIES = 256


class Inexact(Exception):
    """A result is further from the truth than it may be; no time of it is reported."""


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, plan: dit_accel.Plan) -> float:
    """Hold some queries of `out` against fp64, all heads.

    Returns:
        The largest error.

    Raises:
        Inexact: it is more than twice that of plain PyTorch in the same dtype, with a rounding band.
    """
    rows = torch.linspace(0, GRID.tokens - 1, CHECKED_QUERIES).long()
    allowed = plan.token_mask()[rows]

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q[:, :, rows] @ k.mT) * HEAD_DIM**-0.5
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v

    exact = masked(q.double(), k.double(), v.double())
    error = (out[:, :, rows] - exact).abs().max().item()
    plain = (masked(q, k, v) - exact).abs().max().item()
    band = torch.finfo(q.dtype).eps * exact.abs().max().item()
    if not error <= 2 * (plain + band):
        raise Inexact(f"error {error:.2e}, allowed {2 * (plain + band):.2e}: not timed")
    return error


def times(calls: dict[str, Callable[[], torch.Tensor]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn until `seconds` have passed, at least five times each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[next(iter(calls))]) < 5:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append(1000 * (time.perf_counter() - began))
    return taken


def measure(config: dict, dtype: torch.dtype, seconds: float) -> dict:
    """One row, in the fields that every kernel benchmark of this project has."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, GRID.tokens, HEAD_DIM, generator=generator, dtype=dtype) for _ in range(3))
    plan = dit_accel.plan("gna", GRID, **config)
    sparse = functools.partial(dit_accel.attention, q, k, v, plan, impl="portable")
    dense = functools.partial(scaled_dot_product_attention, q, k, v)
    error = check(q, k, v, sparse(), plan)
    dense()
    taken = times({"sparse": sparse, "dense": dense}, seconds)
    low, middle, high = (statistics.quantiles(taken["sparse"], n=10)[i] for i in (1, 4, 7))
    baseline = statistics.median(taken["dense"])
    return {
        "op": "block_sparse_attention",
        "shape": "x".join(map(str, GRID.shape)),
        "method": "gna",
        "config": config,
        "tokens": GRID.tokens,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "density": plan.density,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": "forward",
        "impl": "portable",
        "ms_p50": middle,
        "ms_p20": low,
        "ms_p80": high,
        "tflops_kept": 4 * HEADS * HEAD_DIM * plan.pairs / middle / 1e9,
        "baseline": "torch.nn.functional.scaled_dot_product_attention",
        "baseline_ms_p50": baseline,
        "speedup": baseline / middle,
        "max_error": error,
    }


def provenance() -> dict:
    """Where and with what a row was measured."""
    from dit_accel.cli.versions import machine, versions

    git = ("git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    found, here = versions(), machine()
    return {
        "gpu": None,
        "driver": None,
        "processor": here["processor"],
        "threads": here["torch_threads"],
        "platform": platform.platform(),
        "torch": found["torch"],
        "triton": found["triton"],
        "git": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="file of JSON lines; replaced when complete")
    parser.add_argument("--seconds", type=float, default=5, help="time for each setting")
    options = parser.parse_args()
    where = provenance()
    rows, refused = [], 0
    print(f"{'window':>9} {'stride':>9} {'dtype':>9} {'density':>8} {'ms':>8} {'dense ms':>9} {'speed-up':>8}")
    for dtype, config in itertools.product((torch.float32, torch.bfloat16), WINDOWS):
        window, stride = ("x".join(map(str, x)) if isinstance(x, tuple) else x for x in config.values())
        print(f"{window:>9} {stride:>9} {str(dtype).removeprefix('torch.'):>9}", end=" ", flush=True)
        try:
            row = measure(config, dtype, options.seconds)
        except Inexact as error:
            print(error)
            refused += 1
            continue
        rows.append(row | where)
        print(f"{row['density']:8.4f} {row['ms_p50']:8.1f} {row['baseline_ms_p50']:9.1f} {row['speedup']:8.2f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.output.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.replace(options.output)
    print(options.output)
    if refused:
        raise SystemExit(f"{refused} settings were not timed, because their results are not exact enough.")


if __name__ == "__main__":
    main()
