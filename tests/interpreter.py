"""Triton's interpreter without work whose result it drops: most of the time of interpreted tests."""

import dataclasses
import functools
import inspect


def drop_unused_work():
    """Kernels compute the same in less than half the time.

    The interpreter does each sum and product of integers again in 64 bits, for an assertion that only `debug` makes.
    In each call of a kernel's function it searches `triton.language` for what its launch has replaced already.
    """
    from triton.runtime import interpreter

    builder, stock = interpreter.interpreter_builder, interpreter._patch_lang
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    language = interpreter.tl

    @functools.cache
    def modules(function):
        return [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (language, language.core)]

    def patch(function):
        replaced = not any(language.core.is_builtin(module.load) for module in modules(function))
        return interpreter._LangPatchScope() if replaced else stock(function)

    interpreter._patch_lang = patch
