"""Launches a Triton kernel with the fastest of its candidates; with the first under the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from dit_accel.kernels.block_sparse.triton_configs import Launch

Programs = tuple[int, int] | Callable[[dict[str, Any]], tuple[int, int]]


def launch(
    kernel: Any,
    programs: Programs,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    candidates: tuple[Launch, ...],
    key: tuple[str, ...],
) -> None:
    """Run a kernel. Tuning runs it several times, so it must write its results, never add to what is there.

    Args:
        kernel: a jitted function; one with a constant STEP gets the candidate's.
        programs: the grid, or a function of all named arguments that gives it.
        arguments: what is known at run time; the first is a tensor.
        constants: compile-time constants save STEP.
        candidates: at least one, best first; a single one is not timed.
        key: constants by which launches are tuned separately, if the kernel has them. The dtypes always count.
    """
    if isinstance(kernel, InterpretedFunction):
        kernel[programs](*arguments, **constants, **_step(kernel, candidates[0]))
        return
    with torch.cuda.device(arguments[0].device):
        # Triton 3.10 changes the default of fusion. fp32 sums are more exact with a * b + c contracted.
        tuned(kernel, candidates, key)[programs](*arguments, **constants, enable_fp_fusion=True)


@functools.cache
def tuned(kernel: Any, candidates: tuple[Launch, ...], key: tuple[str, ...]) -> Any:
    """The kernel under Triton's autotuner, whose choice is kept on disk with the binaries."""
    configs = [triton.Config(_step(kernel, c), num_warps=c.warps, num_stages=c.stages) for c in candidates]
    key = tuple(name for name in key if name in kernel.arg_names)
    return triton.autotune(configs, key=list(key), cache_results=True)(kernel)


def _step(kernel: Any, candidate: Launch) -> dict[str, int]:
    return {"STEP": candidate.step} if "STEP" in kernel.arg_names else {}
