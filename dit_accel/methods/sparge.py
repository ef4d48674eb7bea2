"""Block-sparse attention that chooses key blocks by pooled scores: the best few, and as many as hold a given mass.

Query block i and key block j have the means q_i and k_j. Their score is s q_i . k_j, with the scale s of the logits.
Score "subblock" cuts each block into `cells` runs of tokens; it is the logarithm of the sum of exp(s mean . mean) over
all pairs of cells. Score "learned" is that of a trained gate (`plans/gate.py`). A row keeps its `topk` best blocks, and
the fewest best blocks that hold `topp` of the softmax over its scores. Kept blocks are attended exactly; the others are
left out, or in the tail (`kernels/tail/README.md`).

Score "error" keeps as many blocks as "mean" does in every row, but those whose tail would be most wrong: SVG-EAR's
errors a pair, equation (4) of that README. Blocks stand in place of the paper's k-means clusters. The budget has
neither the paper's log n_j, constant for blocks of one size, nor its share of clusters that are kept by mass.

Sources: "SpargeAttention2: Trainable Sparse Attention via Hybrid Top-k+Top-p Masking and Distillation Fine-Tuning",
arXiv 2602.13515, for the union and the default settings. "SpargeAttn: Accurate Sparse Attention Accelerating Any Model
Inference", arXiv 2502.18137, for the guard; its settings are ``topk=0, topp=0.98, similarity=0.6`` by mass and
``topk=0.5, topp=0, similarity=-0.1`` by number. SGLang's subblock_sparse, for that score.
SeerAttention, arXiv 2410.13276, for the gate. "SVG-EAR: Parameter-Free Linear Compensation for Sparse Video Generation
via Error-aware Routing", arXiv 2603.08982, for the error, as its released code computes it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.cuts import visual_of
from dit_accel.kernels.router.api import route, route_pooled
from dit_accel.kernels.router.portable import rank
from dit_accel.kernels.router.rule import Rule
from dit_accel.kernels.tail.errors import most_wrong, tail_errors
from dit_accel.method import LearnedModule, Method, RecallCalibration
from dit_accel.methods.settings import GATE, TokenSettings
from dit_accel.plans.gate import BlockGate, gated
from dit_accel.plans.memory import recalled_lists
from dit_accel.plans.plan import PlanArguments, per_device
from dit_accel.plans.routed import GATED
from dit_accel.plans.tailed import TailedPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import fits, option

if TYPE_CHECKING:
    from dit_accel.hooks.selfcheck import ComputedAttention

Score = Literal["mean", "subblock", "learned", "error"]
Tail = Literal["none", "mean"]


@dataclasses.dataclass(frozen=True)
class Config(TokenSettings):
    """Settings of sparge; the defaults are SpargeAttention2's for Wan 2.1 1.3B.

    Args:
        topk: share of the visual key blocks that every query block keeps, in [0, 1]. Of K blocks these are
            ``int(topk * K)``.
        topp: share of the softmax over a row's scores that the kept blocks hold at least, in [0, 1]; 1 keeps all. Every
            row keeps at least one block.
        score: "mean": of block means; "subblock": of all pairs of cell means; "learned": of a gate, which equals "mean"
            until it is trained; "error": of the tail's error, with tail "mean" only.
        cells: runs of tokens that a block is cut into, with score "subblock".
        similarity: the guard of SpargeAttn: all queries keep a key block whose tokens are less similar to each other,
            and such a query block keeps all keys. The measure is the mean of the Gram matrix of normalised tokens.
        tail: what becomes of the other blocks. "none": they are left out; "mean": each is one pseudo-key, as in sol.
        budgets: "equal", or a share of the key blocks for each head of the layer, each in (0, 1], in place of `topk`.
            `accelerate` and ``--method`` make those of each layer from a file of `dit-accel tune --calibrate`.
        refresh: denoising steps for which a layer keeps the lists of a guidance branch; 1: it routes in each call.
    """

    topk: float = option(0.03, least=0, most=1, ramps=True)
    topp: float = option(0.2, least=0, most=1, ramps=True)
    score: Score = "mean"
    cells: int = option(4, least=1)
    similarity: float | None = option(None, least=-1, most=1)
    tail: Tail = "none"
    budgets: Literal["equal"] | tuple[float, ...] = "equal"
    refresh: int = option(1, least=1)

    def __post_init__(self) -> None:
        if self.budgets != "equal" and not _are_shares(self.budgets):
            raise DitAccelError(
                f"budgets is 'equal' or a share above 0 and at most 1 for each head of a layer; got {self.budgets!r}. "
                "A calibration's file has those of all layers: give it to accelerate or --method."
            )
        super().__post_init__()
        if not self.topk and not self.topp and self.budgets == "equal":
            raise DitAccelError("sparge keeps blocks by topk or topp; both are 0. Set one of them above 0.")
        for name in ("block_q", "block") if self.score == "subblock" else ():
            size = getattr(self, name) or self.block
            if size % self.cells:
                raise DitAccelError(f"{name} must divide into cells={self.cells}; got {size}.")
        if self.score in ("learned", "error") and self.similarity is not None:
            raise DitAccelError(
                f"similarity={self.similarity} keeps blocks that their means misjudge, and score='{self.score}' does "
                "not judge by means alone. Leave out similarity."
            )
        if self.score == "error" and self.tail == "none":
            raise DitAccelError("score='error' ranks blocks by the error of the tail; set tail='mean' with it.")

    @property
    def keeps_all(self) -> bool:
        """Whether they say that every block is kept, as calibration wants it."""
        return self.topk == 1 or self.topp == 1

    def counts(self, blocks: int) -> int:
        """Blocks that every row keeps by number, of `blocks` visual key blocks."""
        return int(self.topk * blocks)

    @property
    def cells_scored(self) -> int:
        """Cells of a block whose means are compared; 1: the block's own mean."""
        return self.cells if self.score == "subblock" else 1


def _are_shares(value: Any) -> bool:
    return bool(value) and fits(value, tuple[float, ...]) and all(0 < share <= 1 for share in value)


class SpargePlan(TailedPlan):
    """sparge on one grid."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("sparge", config, grid, *config.cut(grid))

    @property
    def pairs(self) -> int | None:
        """As of `bound` if blocks are kept by number alone; else None."""
        config, blocks = self.config, self.key_order.visual_blocks
        if config.topp or config.similarity is not None:
            return None
        most = self.bound(max(1, max(self.budgets()) if config.budgets != "equal" else config.counts(blocks)))
        return min(most + self.grid.visual * config.extra_tokens, self.grid.tokens**2)

    def always(self) -> tuple[int, None]:
        config, blocks = self.config, self.key_order.visual_blocks
        return max(1, min(self.budgets()) if config.budgets != "equal" else config.counts(blocks)), None

    def budgets(self) -> list[int]:
        """Blocks that a row of each head keeps by number: the least that hold the head's share of them."""
        assert self.config.budgets != "equal"
        return [math.ceil(share * self.key_order.visual_blocks) for share in self.config.budgets]

    def build(self, device: torch.device) -> None:
        super().build(device)
        if self.config.budgets != "equal":
            self._budgets_on(device)

    def routing(self) -> dict[str, Any]:
        config = self.config
        by_number = not config.topp and config.similarity is None and config.budgets == "equal"
        return {"by_number": by_number} | (GATED if config.score == "learned" else {})

    def counts_of(self, call: PlanArguments, heads: int, device: torch.device) -> int | torch.Tensor:
        """Blocks that rows keep by number: an int, or int32 [heads, 1]. Budgets for other heads are refused."""
        if self.config.budgets == "equal":
            return self.config.counts(self.key_order.visual_blocks)
        first, every = (0, heads) if call.heads is None else call.heads
        if every != len(self.config.budgets):
            raise DitAccelError(
                f"budgets has shares for {len(self.config.budgets)} heads, but the layer has {every}; give "
                "one for each."
            )
        return self._budgets_on(device)[first : first + heads]

    @per_device
    def _budgets_on(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.budgets(), dtype=torch.int32)[:, None].to(device)

    def rank(self, q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """The visual key blocks of the query blocks `rows`, the best first: int64 [B, H, rows, key blocks].

        q and k are in model order.
        """
        queries, keys = (visual_of(self.arrange(x), self.grid) for x in (q, k))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return rank(queries, keys, (self.query_order, self.key_order), rows, self.config.cells_scored, factor)

    def choose(self, q: torch.Tensor, k: torch.Tensor, call: PlanArguments) -> BlockLists:
        config = self.config
        rule = Rule(
            topk=self.counts_of(call, q.shape[1], q.device),
            topp=float(config.topp),
            cells=config.cells_scored,
            similarity=config.similarity,
        )
        orders = self.query_order, self.key_order

        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale

        def routed() -> BlockLists:
            if config.score == "learned":
                return route_pooled(*gated(q, k, orders, call), rule, scale=scale, impl=call.impl)
            lists = route(q, k, *orders, rule, scale=call.scale, impl=call.impl)
            if config.score != "error":
                return lists
            if call.values is None:
                raise DitAccelError("score='error' routes by the values too: route(q, k, values=v).")
            return most_wrong(tail_errors(q, k, call.values, *orders, scale), lists)

        shape = *q.shape[:2], self.query_order.visual_blocks, self.key_order.visual_blocks
        return recalled_lists(call.memory, config.refresh, self, shape, routed)


WHOLE = {"topk": 1.0, "topp": 0.0, "tail": "none", "refresh": 1}  # every block is kept


@torch.no_grad()
def block_recall(call: ComputedAttention, queries: torch.Tensor) -> torch.Tensor:
    """The recall of each head by the number of blocks that a row keeps: float64 [heads, key blocks].

    Entry c - 1 is that of the c best blocks by number, text and conditioning included, as a mean over the call's
    samples and over some visual queries.

    Args:
        call: of sparge, with any settings.
        queries: int64 [S], from the first visual token.
    """
    plan = call.plan
    assert isinstance(plan, SpargePlan)
    (batch, heads, *_), device, grid = call.q.shape, call.q.device, plan.grid
    of_query, of_key = (plan.block_of(order).to(device) for order in (plan.query_order, plan.key_order))
    rows, row = of_query[queries].unique(return_inverse=True)
    total = torch.zeros(heads, plan.key_order.visual_blocks, dtype=torch.float64, device=device)
    for b in range(batch):
        ranking = plan.rank(call.q[b : b + 1], call.k[b : b + 1], rows, call.scale)[0]  # [heads, rows, key blocks]
        for h in range(heads):
            for chunk, weights in call.dense_weights(b, h, queries):
                wide = weights.double()
                mass = wide.new_zeros(len(chunk), total.shape[1]).index_add_(1, of_key, wide[:, grid.visual_rows])
                others = wide.sum(-1, keepdim=True) - mass.sum(-1, keepdim=True)
                total[h] += (mass.gather(1, ranking[h, row[chunk]]).cumsum(1) + others).sum(0)
    return total / (batch * len(queries))


def budgets_for(curve: torch.Tensor, recall: float) -> dict[str, Any] | None:
    """Settings with which every head keeps the fewest blocks that reach a recall; None if all need every block.

    A share of (c - 1/2) / blocks, rounded up, is c of those blocks. `curve` is of `block_recall`.
    """
    blocks = curve.shape[1]
    counts = (1 + (curve < recall).sum(-1)).clamp(max=blocks).tolist()
    if min(counts) == blocks:
        return None
    return {"topk": 0.0, "topp": 0.0, "budgets": tuple(round((count - 0.5) / blocks, 7) for count in counts)}


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The share of visual blocks by number alone, to six digits."""
    return {"topk": min(1.0, max(1e-6, float(f"{grid.visual_share(density):.6g}"))), "topp": 0.0}


METHOD = Method(
    name="sparge",
    config=Config,
    plan=lambda grid, config: SpargePlan(config, grid),
    summary="the key blocks with the highest pooled scores, by number and by mass",
    source="SpargeAttention2, arXiv 2602.13515; SpargeAttn, arXiv 2502.18137",
    good_for="high sparsity after fine-tuning",
    calibration=RecallCalibration("budgets.json", WHOLE, block_recall, budgets_for),
    module=LearnedModule(
        attribute="block_gate",
        make=lambda head_dim, heads, config: BlockGate(head_dim, heads),
        when=lambda config: config.score == "learned",
    ),
    objectives=(GATE,),
    at_density=at_density,
)
