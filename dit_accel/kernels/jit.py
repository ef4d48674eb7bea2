"""Decorators of kernels. An integer argument never has a binary of its own, also as a member of a record.

Triton compiles a binary of its own for integers that are 1 and for multiples of 16. Its option ``do_not_specialize``
turns that off for an argument, not for the members of a tuple (3.6 to 3.9). The kernels here take records, and a new
video length must not compile anything. Pointers stay specialized on their alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction

LARGEST = 2**31  # of a 32-bit number; others have a binary of their own


class _AnyInteger:
    """Mixed into a jitted function: the binder of its arguments leaves the values of integers out of the key."""

    def create_binder(self) -> tuple[Any, ...]:
        *others, binder = super().create_binder()  # type: ignore[misc]
        return (*others, any_integer(self, binder))


class TritonKernel(_AnyInteger, JITFunction):
    """A Triton kernel whose binaries depend on no integer's value."""


class GluonKernel(_AnyInteger, GluonJITFunction):
    """A Gluon kernel whose binaries depend on no integer's value."""


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a kernel; under the interpreter it is the same."""
    jitted = triton.jit(function)
    return TritonKernel(function) if isinstance(jitted, JITFunction) else jitted


def gluon_kernel(function: Callable[..., Any]) -> Any:
    """`gluon.jit` for a kernel."""
    return GluonKernel(function)


def any_integer(jitted: Any, binder: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's binder, which returns arguments, their types and keys, and options; without the keys of integers."""

    def bind(*arguments: Any, **keywords: Any) -> tuple[Any, Any, Any]:
        bound, specialization, options = binder(*arguments, **keywords)
        declared = zip(jitted.params, bound.values(), specialization, strict=True)
        return bound, [spec if p.is_constexpr else _general(value, spec) for p, value, spec in declared], options

    return bind


def _general(value: Any, spec: tuple[Any, Any]) -> tuple[Any, Any]:
    """Type and key of an argument, the same for all integers of a width."""
    if isinstance(value, tuple):
        members = [_general(x, pair) for x, pair in zip(value, zip(*spec, strict=True), strict=True)]
        kinds, keys = zip(*members, strict=True) if members else ((), ())
        return like_record(value, kinds), like_record(value, keys)
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -LARGEST <= value < LARGEST else "i64", None
    return spec


def like_record(record: tuple[Any, ...], members: tuple[Any, ...]) -> tuple[Any, ...]:
    """Members as a record of the same class, or as a plain tuple."""
    return type(record)(*members) if hasattr(record, "_fields") else members
