"""The grid of the Long-Context Attention Benchmark: operator x mask x length x parallel degree, in our masks.

Source: arXiv 2510.17896 and its authors' later tables: 64 heads of 128 in bf16, windows of 1,024, lengths that double.
They have grouped keys of 8 heads and documents of sampled lengths; here every head has its own keys, and documents have
4,096 tokens each. A shape named `cp8` is what one of 8 processes computes under Ulysses: an eighth of the heads.
"""

import itertools

from dit_accel.bench.rows import Shape, Target

LENGTHS = (8_192, 32_768, 65_536)
HEADS, DEGREES = 64, (1, 8)
WINDOW, DOCUMENT = 1024, 4096


def masks(tokens: int) -> tuple[Target, ...]:
    """Full, causal, both sliding windows, documents, and blocks: equally many in each row, or as their scores say."""
    window, document = (1, 1, WINDOW), (1, 1, DOCUMENT)
    triangle = WINDOW * (WINDOW + 1) / 2 + WINDOW * (tokens - WINDOW)
    return (
        Target.of("dense", 1.0),
        Target.of("gna", (tokens + 1) / (2 * tokens), window="full", causal=True),
        Target.of("gna", WINDOW / tokens, window=window),
        Target.of("gna", triangle / tokens**2, window=window, causal=True),
        Target.of("gna", DOCUMENT / tokens, window=document, stride=document),
        *(Target("sparge", share) for share in (0.5, 0.2)),
        Target.of("sparge", topk=0.0, topp=0.5),
    )


SHAPES = tuple(
    Shape(
        f"longca-{tokens // 1024}k" + (f"-cp{degree}" if degree > 1 else ""),
        (1, 1, tokens),
        heads=HEADS // degree,
        targets=masks(tokens),
        directions=("forward", "backward"),
        devices=(),  # where they are named
    )
    for tokens, degree in itertools.product(LENGTHS, DEGREES)
)
