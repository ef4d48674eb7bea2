"""A shape small enough for a processor: windows of whole blocks and of whole frames, one that slides, and bands.

The row of `dense` times dense attention against itself: how far it is from 1 is the noise of the machine. Of
other methods a row or two show the speed; the calls of `scaledit` have anchors, which its dense attention has not.
"""

from dit_accel.bench.rows import Shape, Target

SHAPES = (
    Shape(
        "cpu",
        (8, 32, 32),
        heads=4,
        head_dim=64,
        targets=(
            Target.of("dense", 1.0),
            Target.of("gna", 1 / 4, window=(8, 16, 16), stride=(8, 16, 16)),
            Target.of("gna", 1 / 8, window=(8, 16, 8), stride=(8, 16, 8)),
            Target.of("gna", 1 / 16, window=(8, 8, 8), stride=(8, 8, 8)),
            Target.of("gna", 3 / 8, window=(3, 32, 32)),
            Target.of("gna", 1 / 8, window=(4, 16, 16)),
            Target.of("tile", 0.53, references=2),
            Target.of("radial", 0.63, decay=0.5),
            *(Target("sla", density) for density in (1 / 4, 1 / 8, 1 / 16)),
            Target("sol", 0.16),
            Target("radial", 1 / 2),
            Target.of("heads", 1 / 2, keep=(1, 0, 1, 0)),
            Target.of("moh", 3 / 4),
            Target.of("moh", 1 / 2, shared=0.25, routed=0.25),
            Target.of("agent", 1 / 8),
            Target("proxy", 1 / 8),
            Target.of("clear", 0.15, radius=8),
            Target.of("scaledit", 0.28),
        ),
        dtypes=("float32", "bfloat16"),
        directions=("forward", "both"),
        devices=("cpu",),
    ),
)
