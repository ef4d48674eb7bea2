"""What every implementation of the router shares: its rule, a call's settings, and how blocks are cut into cells."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import torch

from dit_accel.errors import DitAccelError
from dit_accel.order import TokenOrder

Variance = Literal["diagonal", "exact"]
VARIANCES: tuple[str, ...] = get_args(Variance)

# Sol-Attn adds 1e-6 to the variance of scores in units of log2.
VARIANCE_FLOOR = 1e-6 * math.log(2) ** 2


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """Which visual key blocks a visual query block lists: the union of the parts below, and always at least one.

    Key blocks are ranked by their score, the logit of the block means; of equal scores the lower index ranks higher. A
    row in which no part chooses a block lists its best one.

    Args:
        topk: the best so many; an int, or int32 that broadcasts to [B, H, query blocks].
        topp: the fewest best blocks that together hold this share of the row's softmax over block scores. A float, or
            fp32 that broadcasts to [B, H, query blocks]. 0: none; 1 or more: all blocks.
        tau: blocks whose score exceeds the row's mean score by more than `tau` standard deviations; None: no such part.
        variance: of the scores of a row: "exact", or "diagonal", which neglects the covariances of the key means.
        cells: each block is cut into so many runs of tokens. Its score is the log of the sum of the exponentials of all
            pairs of cell means. 1: block means.
        similarity: blocks whose tokens are less similar to each other are not pooled. All rows list such a key block,
            which is not ranked; such a query block lists all blocks. The measure is the mean of all entries of the Gram
            matrix of normalised tokens. None: no guard.
        forced: bool [query blocks, key blocks], listed in any case; they do not use up `topk`.

    Source:
        Threshold: Sol-Attn (arXiv 2607.24027). Union of top-k and top-p: SpargeAttention2 (arXiv 2602.13515).
        Similarity: SpargeAttn (arXiv 2502.18137). Cells: SGLang's SubBlock router.

    Raises:
        DitAccelError: a number is out of range.
    """

    topk: int | torch.Tensor = 0
    topp: float | torch.Tensor = 0.0
    tau: float | None = None
    variance: Variance = "diagonal"
    cells: int = 1
    similarity: float | None = None
    forced: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("topk", "topp"):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) and not value >= 0:
                raise DitAccelError(f"{name} of a rule is at least 0; got {value!r}.")
        if self.variance not in VARIANCES:
            raise DitAccelError(f"variance must be one of {', '.join(VARIANCES)}; got {self.variance!r}.")
        if self.cells < 1:
            raise DitAccelError(f"A block is cut into at least one cell; got cells={self.cells}.")
        if self.cells > 1 and self.tau is not None:
            raise DitAccelError("tau needs the scores of block means; use it with cells=1.")

    @property
    def by_number(self) -> bool:
        """Whether all rows list the same number of blocks."""
        fixed = isinstance(self.topk, int) and isinstance(self.topp, float | int) and self.topp == 0
        return fixed and self.tau is None and self.similarity is None and self.forced is None

    def width(self, key_blocks: int) -> int:
        """The longest list that the rule can make."""
        return min(max(1, int(self.topk)), key_blocks) if self.by_number else key_blocks


class RouterArguments(NamedTuple):
    """A rule and a call's sizes, as implementations take them.

    query_order, key_order: how visual queries and keys are cut into blocks.
    counts, shares: int32 and fp32 [B or 1, H or 1, query blocks or 1]: `topk` and `topp`; None for none.
    forced: bool [query blocks, key blocks] or None.
    tau, exact, cells, similarity: of the rule; `exact` is its variance.
    scale: factor of the logits.
    width: of the lists.
    skip: the number of blocks that rank lowest, listed apart.
    """

    query_order: TokenOrder
    key_order: TokenOrder
    counts: torch.Tensor | None
    shares: torch.Tensor | None
    forced: torch.Tensor | None
    tau: float | None
    exact: bool
    cells: int
    similarity: float | None
    scale: float
    width: int
    skip: int = 0

    @property
    def factor(self) -> float:
        """What scores are multiplied by to be logits."""
        return self.scale if self.cells == 1 else 1.0


def thresholds(
    query_means: torch.Tensor, key_means: torch.Tensor, tau: float, exact: bool, scale: float
) -> torch.Tensor:
    """The score that a key block must exceed: mean + tau * standard deviation over a row's scores, before scaling.

    Args:
        query_means, key_means: [B, H, query blocks, D] and [B, H, key blocks, D].
        tau, exact: as in `Rule`; the variance is the population's.
        scale: factor of the logits, in whose units the variance has its floor.

    Returns:
        [B, H, query blocks].
    """
    center = key_means.mean(-2, keepdim=True)
    spread = key_means - center
    if exact:
        covariance = spread.mT @ spread / key_means.shape[-2]
        variance = ((query_means @ covariance) * query_means).sum(-1)
    else:
        variance = (query_means.square() @ spread.square().mean(-2).unsqueeze(-1)).squeeze(-1)
    mean = (query_means @ center.mT).squeeze(-1)
    return mean + tau * (variance.clamp(min=0) + VARIANCE_FLOOR / scale**2).sqrt()
