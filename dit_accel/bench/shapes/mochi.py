"""Mochi 1."""

from dit_accel.bench.rows import Shape

SHAPES = (Shape("mochi", (28, 30, 53), heads=24, text=256),)
