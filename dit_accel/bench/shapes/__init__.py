"""The sizes to measure, declared as `SHAPES`; `dit_accel.bench.rows` finds the files.

Sizes are in tokens of 16 x 16 pixels. The VAEs make one latent frame of a video's first frame, and one of every 4 that
follow (Mochi: 6).
"""
