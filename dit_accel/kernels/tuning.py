"""Launches a Triton kernel with the fastest of its candidates; with the first under the interpreter.

Triton binds the arguments of every launch anew, which takes as long as the rest of a call on the host. A launch like an
earlier one therefore runs the earlier one's binary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.jit import LARGEST
from dit_accel.order import TokenOrder

Programs = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


class PastLaunch(NamedTuple):
    """A launch: the binary, its programs, and its arguments and constants."""

    binary: Any
    programs: tuple[int, int, int]
    values: tuple[Any, ...]

    def after(self, arguments: int) -> PastLaunch:
        """Without the first arguments, which `repeat` takes."""
        return self._replace(values=self.values[arguments:])

    def repeat(self, *first: Any) -> None:
        """Launch it again on the current device, with tensors of the same dtypes, strides and alignment first."""
        self.binary[self.programs](*first, *self.values)


RASTER = (0, 0, 0)  # the tile of raster order
_launched: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}  # binaries, and the constants in the kernel's order


def launch(
    kernel: Any,
    programs: Programs,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    candidates: tuple[Launch, ...],
    key: tuple[str, ...],
) -> PastLaunch | None:
    """Run a kernel; None under the interpreter.

    Tuning runs it several times, so it must write its results, never add to what is there.

    Args:
        kernel: a jitted function whose constants come last; one with a constant STEP gets the candidate's.
        programs: the grid, or a function of the compile-time constants that gives it.
        arguments: what is known at run time: tensors, numbers and records of them; the first is a tensor.
        constants: compile-time constants save STEP.
        candidates: at least one, best first; a single one is not timed. They follow from the other arguments.
        key: constants by which launches are tuned separately, if the kernel has them. The dtypes always count.
    """
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[programs](*arguments, **constants, **_step(kernel, candidates[0]))
        return None
    device = arguments[0].device
    key_of_launch = (id(kernel), device, *constants.items(), *_facts(arguments))
    with torch.cuda.device(device):
        known = _launched.get(key_of_launch)
        if known is None:
            # Triton 3.10 changes the default of fusion. fp32 sums are more exact with a * b + c contracted.
            tuner = tuned(kernel, candidates, key)
            binary = tuner[programs](*arguments, **constants, enable_fp_fusion=True)
            chosen = {**constants, **tuner.best_config.kwargs}
            chosen = {name: chosen[name] for name in kernel.arg_names[len(arguments) :]}
            _launched[key_of_launch] = binary, chosen
        else:
            binary, chosen = known
        width, height, depth, *_ = *(programs(chosen) if callable(programs) else programs), 1, 1
        launched = PastLaunch(binary, (width, height, depth), (*arguments, *chosen.values()))
        if known is not None:
            launched.repeat()
        return launched


def _facts(arguments: tuple[Any, ...]) -> list[Any]:
    """What Triton's binaries depend on beside constants: dtypes and alignments, and the width of integers."""
    facts: list[Any] = []
    for x in arguments:
        if isinstance(x, tuple):
            facts += _facts(x)
        elif isinstance(x, int):
            facts.append(-LARGEST <= x < LARGEST)
        elif isinstance(x, torch.Tensor):
            facts += (x.dtype, x.data_ptr() % 16 == 0)
        elif not isinstance(x, float):  # a descriptor
            facts += (x.base.dtype, *x.block_shape)
    return facts


@functools.cache
def tuned(kernel: Any, candidates: tuple[Launch, ...], key: tuple[str, ...]) -> Any:
    """The kernel under Triton's autotuner, whose choice is kept on disk with the binaries."""
    configs = [
        triton.Config(_step(kernel, c), num_warps=c.warps, num_stages=c.stages, maxnreg=c.registers) for c in candidates
    ]
    key = tuple(name for name in key if name in kernel.arg_names)
    return triton.autotune(configs, key=list(key), cache_results=True)(kernel)


def alignment(*tensors: torch.Tensor) -> int:
    """Elements that divide all strides of tensors [B, H, N, D]: 16 bytes of them, which is one load, or 1."""
    unit = 16 // tensors[0].element_size()
    aligned = all(stride % unit == 0 for x in tensors for stride in x.stride()[:3])
    return unit if aligned and all(x.data_ptr() % 16 == 0 for x in tensors) else 1


def head_dims(dim: int) -> dict[str, int]:
    """The kernels' constants for a head dimension."""
    return {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))}


def block_sizes(order: TokenOrder, side: str = "") -> dict[str, Any]:
    """The kernels' constants for the blocks of one side: "_Q", "_K", or none where there is one side."""
    return {f"BLOCK{side}": order.block, f"TILE{side}": order.tile or RASTER}


def _step(kernel: Any, candidate: Launch) -> dict[str, int]:
    return {"STEP": candidate.step} if "STEP" in getattr(kernel, "arg_names", ()) else {}
