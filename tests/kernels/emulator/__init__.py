"""Runs the source of Gluon kernels on a CPU: partitions are threads, copies arrive late, products are computed late.

It finds what makes a kernel hang or read the wrong memory: wrong phases, early releases, missing waits and fences,
addresses outside a tensor. It sees neither layouts nor swizzles nor registers, and says nothing of speed.
"""

import dis
import itertools
import types

import torch
import triton.experimental.gluon.language as gluon_language
import triton.language as triton_language
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.jit import like_record
from emulator import language
from emulator.language import Descriptor
from emulator.machine import ORDERS, Deadlock, KernelError, Machine

__all__ = ["ORDERS", "Deadlock", "Descriptor", "KernelError", "Machine", "emulated", "launch"]

IN_PLACE = 13  # BINARY_OP's arguments of operators that assign, above those that do not (CPython, opcode.h)
_COPIES = {
    "async_load": language.tma.async_load,
    "async_copy_global_to_shared": language.tma.async_load,
    "async_store": language.tma.async_store,
    "async_copy_shared_to_global": language.tma.async_store,
}
_STAND_INS = {
    id(gluon_language): language.gl,
    id(triton_language): language.gl,
    id(hopper.mbarrier): language.mbarrier,
    id(hopper.tma): language.tma,
    id(hopper.fence_async_shared): language.fence_async_shared,
    id(hopper.warpgroup_mma): language.warpgroup_mma,
    id(hopper.warpgroup_mma_wait): language.warpgroup_mma_wait,
    **{id(getattr(hopper.tma, name)): copy for name, copy in _COPIES.items() if hasattr(hopper.tma, name)},
}


def emulated(kernel, known_functions=None):
    """The Python function behind a jitted one, which calls this package where it called Gluon or Triton."""
    functions = {} if known_functions is None else known_functions
    function = kernel.fn
    if function not in functions:
        scope = {}
        functions[function] = types.FunctionType(
            _rebinding(function.__code__), scope, function.__name__, function.__defaults__, function.__closure__
        )
        functions[function].__kwdefaults__ = function.__kwdefaults__
        scope["__builtins__"] = function.__globals__["__builtins__"]
        for name in function.__code__.co_names:
            if name in function.__globals__:
                scope[name] = _stand_in(function.__globals__[name], functions)
    return functions[function]


def _rebinding(code):
    """`x += y` as ``x = x + y``, which is what it means in a kernel; tensors of PyTorch would change in place."""
    plain = bytearray(code.co_code)
    for at in range(0, len(plain), 2):
        if plain[at] == dis.opmap["BINARY_OP"] and IN_PLACE <= plain[at + 1] < 2 * IN_PLACE:
            plain[at + 1] -= IN_PLACE
    return code.replace(co_code=bytes(plain))


def _stand_in(value, functions):
    if id(value) in _STAND_INS:
        return _STAND_INS[id(value)]
    if isinstance(value, gluon_language.constexpr):
        return value.value
    return emulated(value, functions) if hasattr(value, "fn") else value


def launch(kernel, grid, *arguments, seed=0, order="random", **constants):
    """Run every program of a grid, one after the other.

    Args:
        kernel: a `gluon.jit` function.
        grid: up to three numbers of programs.
        arguments: tensors, descriptors and numbers, as a launch takes them.
        seed, order: see `Machine`; each program's choices differ.
        constants: compile-time constants; launch settings beside them are ignored.

    Raises:
        KernelError: see `Machine.run`.
    """
    function = emulated(kernel)
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False)) | {n: v for n, v in constants.items() if n in names}
    parameters = {name: value if name in constants else _argument(value) for name, value in values.items()}
    sizes = (*grid, 1, 1)[:3]
    for number, ids in enumerate(itertools.product(*map(range, sizes))):
        with torch.no_grad(), language.Program(ids, sizes, Machine(hash((seed, number)), order)):
            function(**parameters)


def _argument(value):
    if isinstance(value, tuple):  # a record
        return like_record(value, tuple(map(_argument, value)))
    if isinstance(value, TensorDescriptor):
        return Descriptor(value.base, list(value.shape), list(value.strides), list(value.block_shape))
    if isinstance(value, torch.Tensor):
        if not value.is_contiguous():
            raise KernelError("a pointer argument must be contiguous to be emulated")
        return language.Pointer(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return torch.tensor(value, dtype=torch.int32)
