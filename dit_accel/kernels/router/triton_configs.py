"""Launch settings of the router's Triton kernels, for the launcher and the builds of `tools/kernels`."""

MAX_BLOCKS = 1 << 12  # the longest row of scores that registers hold with all parts of a rule
MAX_COUNTED = 1 << 13  # and by `topk` alone
SCORES = {"ROWS": 32, "COLUMNS": 32, "PART": 16}  # of a program's scores, and the dimensions of a step
PARTS = ("HAS_THRESHOLD", "HAS_COUNT", "HAS_SHARE", "HAS_GUARD", "HAS_FORCED")


def unsupported(head_dim: int, blocks: int, by_number: bool = False) -> str | None:
    """The reason why the kernels cannot compute such a call, or None."""
    most = MAX_COUNTED if by_number else MAX_BLOCKS
    if blocks > most:
        return f"the router's kernel takes at most {most} visual key blocks by this rule, not {blocks}"
    if head_dim > 256:
        return f"the router's kernels take head dimensions up to 256, not {head_dim}"
    return None


def width_of(blocks: int) -> int:
    """Columns of a row's registers: a power of two."""
    return max(32, 1 << (blocks - 1).bit_length())


def warps_of(width: int) -> int:
    """At most 16 scores a thread; 32 and all parts of a rule spill."""
    return max(1, width // 512)
