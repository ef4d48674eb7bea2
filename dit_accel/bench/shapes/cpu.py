"""A shape small enough for a processor. The windows of gna are whole blocks; the last one slides."""

from dit_accel.bench.rows import MethodSetting, Shape

SHAPES = (
    Shape(
        "cpu",
        (8, 32, 32),
        heads=4,
        head_dim=64,
        settings=(
            MethodSetting("gna", 1 / 4, {"window": (8, 16, 16), "stride": (8, 16, 16)}),
            MethodSetting("gna", 1 / 8, {"window": (8, 16, 8), "stride": (8, 16, 8)}),
            MethodSetting("gna", 1 / 16, {"window": (8, 8, 8), "stride": (8, 8, 8)}),
            MethodSetting("gna", 1 / 8, {"window": (4, 16, 16), "stride": 1}),
            *(MethodSetting("sla", density) for density in (1 / 4, 1 / 8, 1 / 16)),
            *(MethodSetting(method, 1 / 2) for method in ("radial", "tile")),
        ),
        dtypes=("float32", "bfloat16"),
        directions=("forward", "both"),
        devices=("cpu",),
    ),
)
