"""The command line: one file a verb. Nothing heavy is imported before a verb runs, so that ``--help`` is instant."""


class Interrupted(Exception):
    """Ctrl-C in a verb that knows what became of its work, which is the message."""
