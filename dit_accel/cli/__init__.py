"""The command line: one file a verb. Nothing heavy is imported before a verb runs, so that ``--help`` is instant."""
