"""Plans whose block lists follow from the queries and keys of a call."""

from __future__ import annotations

import abc
import math
from typing import Any, Literal

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import attend_blocks, attend_visual, gradients_follow, in_autocast_dtype
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments
from dit_accel.kernels.impls import AUTO, Facts, Impl
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans.curves import Curve, Rows, along, rows_along
from dit_accel.plans.plan import BLOCK_K, BLOCK_Q, Plan, PlanArguments, among_others, building, per_device
from dit_accel.plans.tiles import choose_tile
from dit_accel.tokens import TokenGrid

GATED = {"block_q": 1, "block_k": 1}  # what `routing` says where a gate gives a vector a block
LARGEST_BLOCK = 1024  # every block is computed whole, padding included


class RoutedPlan(Plan):
    """A plan that chooses the key blocks of every query block in each call, by content.

    A method implements `choose`. Visual queries attend to the visual blocks that it lists, and to all conditioning and
    text keys. Conditioning and text queries attend to everything. A method may compute more than the listed blocks,
    such as a second part merged by its log-sum-exp. It overrides `attend_visual` and calls `attend_listed` in it.

    Args:
        query_order, key_order: how the visual queries and the visual keys are cut into blocks; both of `grid`.
        curve: the visual tokens are put along this curve before they are cut into blocks, and the output is put back,
            once a call. The orders are raster orders then.

    Attributes:
        kernel: which of the kernels in `impls` compute the visual queries.
    """

    kernel = impls.BLOCK_SPARSE

    def __init__(
        self,
        method: str,
        config: Any,
        grid: TokenGrid,
        query_order: TokenOrder,
        key_order: TokenOrder,
        curve: Curve | None = None,
    ) -> None:
        super().__init__(method, config, grid)
        self.query_order, self.key_order, self.curve = query_order, key_order, curve

    @abc.abstractmethod
    def choose(self, q: torch.Tensor, k: torch.Tensor, call: PlanArguments) -> BlockLists:
        """The visual key blocks that every visual query block attends to.

        Made on the device of q without waiting for it. Carries no gradient. Runs with autocast off.

        Args:
            q, k: the whole sequence, [B, H, N, D], along the plan's curve if it has one.
            call: the other arguments of `attend`.

        Returns:
            Lists without tables: indices int32 [B, H, query blocks, width], counts int32 [B, H, query blocks]. Every
            row lists at least one block, each at most once; the counts of rows may differ.
        """

    @torch.no_grad()
    def route(self, q: torch.Tensor, k: torch.Tensor, **call: Any) -> BlockLists:
        """The blocks of a call with these queries and keys, [B, H, N, D] in model order, as `choose` lists them.

        `call` holds fields of `PlanArguments`; `values` in model order. With a curve, block i holds the tokens that
        `block_of` says.
        """
        if call.get("values") is not None:
            call["values"] = self.arrange(call["values"])
        return self.choose(self.arrange(q), self.arrange(k), PlanArguments(**call))

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, N, D] in model order with the visual tokens along the plan's curve; x itself without one."""
        return x if self.curve is None else _take_rows(x, self._rows_on(x.device)[0])

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, N, D] in model order again; undoes `arrange`."""
        return x if self.curve is None else _take_rows(x, self._rows_on(x.device)[1])

    def block_of(self, order: TokenOrder) -> torch.Tensor:
        """The block of every visual token in `query_order` or `key_order`, in raster order: int64 [visual]."""
        with building():
            blocks = order.block_of_token()[self.grid.visual_rows]
        return blocks if self.curve is None else blocks[along(self.curve, self.grid.shape).argsort()]

    @per_device
    def _rows_on(self, device: torch.device) -> Rows:
        """`rows_along` the plan's curve, on a device."""
        assert self.curve is not None
        return rows_along(self.curve, self.grid, device)

    def attend_visual(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments
    ) -> tuple[torch.Tensor, BlockLists]:
        """The visual queries' output [B, H, visual, D], and the lists that it followed; arguments as of `choose`."""
        with torch.no_grad():
            lists = self.choose(q, k, call)
        return self.attend_listed(q, k, v, lists, call)[0], lists

    def attend_listed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lists: BlockLists,
        call: PlanArguments,
        *,
        lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Exact attention of the visual queries over listed blocks, conditioning and text.

        Returns:
            Output [B, H, visual, D] and the natural log-sum-exp of each row [B, H, visual], None unless `lse` asks for
            it; both carry gradients.
        """
        return attend_visual(
            q, k, v, lists, self.query_order, self.key_order,
            text_lens=call.text_lens, text_bias=call.text_bias, scale=call.scale, lse=lse, impl=call.impl,
        )  # fmt: skip

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments) -> torch.Tensor:
        if not q.shape == k.shape == v.shape or q.ndim != 4 or q.shape[2] != self.grid.tokens:
            raise DitAccelError(
                f"q, k and v must all be [batch, heads, {self.grid.tokens}, head_dim] for the grid {self.grid}; got "
                f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
            )
        q, k, v = in_autocast_dtype(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            if not call.arranged:
                q, k, v = (self.arrange(x) for x in (q, k, v))
                if call.gate is not None:
                    call = call._replace(gate=self.arrange(call.gate))
            if self.curve is not None and call.text_bias is not None:
                call = call._replace(text_bias=call.text_bias[:, self._rows_on(q.device)[0]])
            visual, lists = self.attend_visual(q, k, v, call)
            if call.density_sum is not None:
                self.add_density(lists, call.density_sum)
            if call.head_pairs is not None:
                call.head_pairs.copy_(self.visual_pairs(lists).mean(0))
            out = self.with_others(visual, q, k, v, call)
            return out if call.arranged else self.restore(out)

    @torch.no_grad()
    def add_density(self, lists: BlockLists, density_sum: torch.Tensor) -> None:
        """Add a call's density, and 1 for the call, to float32 [2] on the device of its lists, without waiting for it.

        The density is the attended share of all pairs, as a mean over samples and heads.
        """
        share = (self.visual_pairs(lists).mean() + self.grid.dense_pairs) / self.grid.tokens**2
        density_sum += torch.stack([share, torch.ones_like(share)])

    @torch.no_grad()
    def visual_pairs(self, lists: BlockLists) -> torch.Tensor:
        """The pairs of visual tokens in listed blocks, float32 [B, H], on the device of the lists."""
        queries, keys = self.block_sizes(lists.indices.device)
        # entries behind a row's count may be any number
        held = torch.where(lists.used, keys[lists.indices.clamp(0, len(keys) - 1)], 0).sum(-1, dtype=torch.float32)
        return (held * queries).sum(-1)

    def prepare(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl = AUTO, *, learned: bool = False
    ) -> tuple[str, str]:
        self.build(device)
        return self.start(device, dtype, head_dim, impl, learned)

    def build(self, device: torch.device) -> None:
        """Make what is kept on a device. A traced call would keep tensors in the memory of a CUDA graph."""
        self.block_sizes(device)
        if self.curve is not None:
            self._rows_on(device)

    def calls(self, learned: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        visual_blocks = self.key_order.visual_blocks
        blocks = {"block_q": self.query_order.block, "block_k": self.key_order.block, "visual_blocks": visual_blocks}
        parts = {"attention": (self.kernel, blocks | self.needs(learned))}
        if self.key_order.dense_blocks:
            parts["text"] = impls.BLOCK_SPARSE, {"block_q": BLOCK_Q, "block_k": BLOCK_K}
        routing = self.routing()
        return parts if routing is None else parts | {"router": (impls.ROUTER, blocks | routing)}

    def routing(self) -> dict[str, Any] | None:
        """What `Facts` say of the router's call, besides; None if nothing is routed."""
        return {}

    def needs(self, learned: bool) -> dict[str, Any]:
        """What `Facts` say of a call besides its tensors and orders; `learned` as of `prepare`."""
        return {}

    def kept_keys(self, queries: torch.Tensor, lists: BlockLists | None = None, head: int = 0) -> torch.Tensor:
        """The keys in listed blocks."""
        assert lists is not None, "a routed plan keeps what a call lists"
        rows, columns = (self.block_of(order).to(queries.device) for order in (self.query_order, self.key_order))
        return among_others(self.listed(lists, head)[rows[queries]][:, columns], self.grid)

    def listed(self, lists: BlockLists, head: int) -> torch.Tensor:
        """The blocks that one head of the first sample lists: bool [query blocks, key blocks]."""
        visited = BlockLists(lists.indices[0, head], lists.counts[0, head])
        return visited.map(visited.used, self.key_order.visual_blocks)

    @property
    def pairs(self) -> int | None:
        """None: the number depends on the call. A method may override this with an upper bound."""
        return None

    @building()
    def bound(self, blocks: int) -> int:
        """The most pairs that rows of `blocks` visual blocks attend, text included; exact if all are equally full."""
        sizes = valid_tokens(self.key_order).sort(descending=True).values
        return self.grid.visual * int(sizes[:blocks].sum()) + self.grid.dense_pairs

    def always(self) -> tuple[int, torch.Tensor | None]:
        """What every call lists: blocks in each row, by number, and a map of them, bool [query blocks, key blocks]."""
        return 1, None

    @property
    @building()
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most pairs that a call attends exactly, text included."""
        count, forced = self.always()
        queries, keys = (valid_tokens(order).long() for order in (self.query_order, self.key_order))
        fewest = queries.sum() * keys.sort().values[:count].sum()
        if forced is not None:
            fewest = torch.maximum(fewest, queries @ (forced.long() @ keys))
        return int(fewest) + self.grid.dense_pairs, self.grid.tokens**2 if self.pairs is None else self.pairs

    @property
    def visited(self) -> int | None:
        """Blocks that a head of a call attends, as an upper bound; None if not known before the call."""
        return None

    @property
    def total(self) -> int:
        """Blocks that dense attention visits."""
        return self.query_order.blocks * self.key_order.blocks

    def with_others(
        self, visual: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments
    ) -> torch.Tensor:
        """The whole output [B, H, N, D]: `visual` and the other queries, which attend to everything."""
        grid = self.grid
        if not self.key_order.dense_blocks:
            return visual
        front, back = grid.visual_start, grid.visual_start + grid.visual
        others = torch.cat([q[:, :, :front], q[:, :, back:]], dim=2)
        bias = call.text_bias
        if bias is not None:
            bias = torch.cat([bias[:, :front], bias[:, back:]], dim=1)
        around = attend_all(others, k, v, grid, call._replace(text_bias=bias))
        pieces = [around[:, :, :front], visual, around[:, :, front:]]
        return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1).transpose(1, 2)

    @per_device
    def block_sizes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens in each visual query and key block, float32, for `add_density`. The first call must not be traced."""
        queries, keys = (valid_tokens(order).float().to(device) for order in (self.query_order, self.key_order))
        return queries, keys


def attend_all(
    queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: TokenGrid, call: PlanArguments
) -> torch.Tensor:
    """Attention of any queries to all tokens of a sequence: [B, H, S, D], in memory [B, S, H, D].

    Args:
        queries: [B, H, S, D]; `call.text_bias` is theirs, [B, S].
        k, v: [B, H, N, D], of a sequence on `grid`.
    """
    count = queries.shape[2]
    geometry = Geometry(
        grid.shape, (1, 1, count), BLOCK_Q, BLOCK_K, None, None, grid.conditioning, grid.text,
        own_queries=True, text_first=grid.text_first,
    )  # fmt: skip
    every = torch.arange(geometry.key_order.blocks, dtype=torch.int32, device=queries.device)
    lists = BlockLists.full(every.expand(math.ceil(count / BLOCK_Q), -1).contiguous())
    segments = Segments.of(queries, call.text_lens)
    gradients, biased = gradients_follow(queries, k, v), call.text_bias is not None
    facts = Facts(queries.device, queries.dtype, queries.shape[-1], BLOCK_Q, BLOCK_K, gradients, biased)
    impl = impls.beside(call.impl, facts, impls.BLOCK_SPARSE)
    return attend_blocks(
        queries, k, v, lists, geometry, segments, text_bias=call.text_bias, scale=call.scale, few=True, impl=impl
    )[0]


def _take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of [B, H, N, D] in another order; the result lies in memory as [B, N, H, D]."""
    return x.transpose(1, 2).index_select(1, rows).transpose(1, 2)


Ordering = Literal["raster", "tile", "morton", "hilbert"]


def cut(order: Ordering, grid: TokenGrid, block_q: int, block_k: int) -> tuple[TokenOrder, TokenOrder, Curve | None]:
    """The orders of queries and keys, and the curve, that an ordering of tokens means for a `RoutedPlan`.

    "raster": runs of tokens, row by row; "tile": 3-D tiles, chosen per grid; "morton", "hilbert": runs along a curve.
    """
    tiles = (choose_tile(block, grid) if order == "tile" else None for block in (block_q, block_k))
    query_order, key_order = (
        TokenOrder(grid, block, tile) for block, tile in zip((block_q, block_k), tiles, strict=True)
    )
    return query_order, key_order, order if order == "morton" or order == "hilbert" else None
