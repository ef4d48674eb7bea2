"""Block-sparse attention: block lists in, exact attention over the listed blocks out. Start at `api`."""
