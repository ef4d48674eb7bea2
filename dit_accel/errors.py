"""Errors that the user can mend."""


class DitAccelError(ValueError):
    """Something the user asked for cannot be done; the message says what was wanted, what came and what to do.

    The command line prints the message as one line and exits with status 2.
    """


class DitAccelWarning(UserWarning):
    """Something that is not as the user may think; the message says what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def lost_process(error: RuntimeError) -> bool:
    """Whether `torch.distributed` raised an error because another process is gone or does not answer."""
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
