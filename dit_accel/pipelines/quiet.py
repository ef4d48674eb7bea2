"""A quiet terminal: what other libraries log and warn of, and the user can do nothing about, is not shown."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from dit_accel.errors import DitAccelWarning

# Loggers that stay above WARNING: missing kernels of torchao, deprecations inside PyTorch, hints of the libraries.
LOGGERS = ("accelerate", "diffusers", "huggingface_hub", "peft", "torch.utils._pytree", "torchao", "transformers")
# The libraries set their loggers' levels when they are imported, from these.
LEVELS = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block only errors of other libraries are shown; what the user has set by hand wins.

    That is Python's -W, and the libraries' own environment variables.
    """
    chosen = {name for name in LEVELS if name in os.environ}
    loggers = [logging.getLogger(name) for name in LOGGERS if f"{name.upper()}_VERBOSITY" not in chosen]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    added = {name: level for name, level in LEVELS.items() if name not in chosen}
    os.environ.update(added)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", DitAccelWarning)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for name in added:
                os.environ.pop(name, None)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silences the progress bars and log lines of Diffusers and Transformers, but no exception."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.enable_progress_bar()
            library.set_verbosity(level)
