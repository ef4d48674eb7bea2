"""Sparse-linear attention: a router, exact attention over the critical blocks, a linear branch for the rest."""
