"""The command line: one file a verb. Nothing heavy is imported before a verb runs, so that ``--help`` is instant."""

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it
