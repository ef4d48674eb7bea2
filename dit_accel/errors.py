"""Errors that the user can mend."""


class DitAccelError(ValueError):
    """Something the user asked for cannot be done; the message says what was wanted, what came and what to do.

    The command line prints the message as one line and exits with status 2.
    """
