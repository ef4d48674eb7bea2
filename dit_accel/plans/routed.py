"""Plans whose block lists follow from the queries and keys of a call."""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import attend_blocks, attend_visual
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments
from dit_accel.kernels.impls import AUTO, Facts, Impl
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans.blocks import BlockMask
from dit_accel.plans.plan import Plan, among_others, building
from dit_accel.tokens import TokenGrid


class RoutedCall(NamedTuple):
    """Arguments of `Plan.attend` besides q, k and v."""

    scale: float | None = None
    text_lens: torch.Tensor | None = None
    text_bias: torch.Tensor | None = None
    impl: Impl = AUTO
    module: nn.Module | None = None


class RoutedPlan(Plan):
    """A plan that chooses the key blocks of every query block in each call, by content.

    A method implements `route`. Visual queries attend to the visual blocks that it lists, and to all conditioning and
    text keys. Conditioning and text queries attend to everything. A method that computes more than the listed blocks,
    such as a second part merged by its log-sum-exp, overrides `attend_visual` and calls `attend_listed` in it.

    Args:
        method, config, grid: as for `Plan`.
        query_order, key_order: how the visual queries and the visual keys are cut into blocks; both of `grid`.
    """

    def __init__(
        self, method: str, config: Any, grid: TokenGrid, query_order: TokenOrder, key_order: TokenOrder
    ) -> None:
        super().__init__(method, config, grid)
        self.query_order, self.key_order = query_order, key_order
        self._sizes: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @abc.abstractmethod
    def route(self, q: torch.Tensor, k: torch.Tensor) -> BlockLists:
        """The visual key blocks that every visual query block attends to.

        Made on the device of q without waiting for it. Carries no gradient. Runs with autocast off.

        Args:
            q, k: the whole sequence, [B, H, N, D].

        Returns:
            Lists without tables: indices int32 [B, H, query blocks, width], counts int32 [B, H, query blocks]. Every
            row lists at least one block, each at most once; the counts of rows may differ.
        """

    def attend_visual(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: RoutedCall
    ) -> tuple[torch.Tensor, BlockLists]:
        """The visual queries' output [B, H, visual, D], and the lists that it followed.

        Args:
            q, k, v: the whole sequence, [B, H, N, D].
            call: the other arguments of `attend`.
        """
        with torch.no_grad():
            lists = self.route(q, k)
        return self.attend_listed(q, k, v, lists, call)[0], lists

    def attend_listed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lists: BlockLists,
        call: RoutedCall,
        *,
        lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Exact attention of the visual queries over listed blocks, conditioning and text.

        Args:
            lse: the log-sum-exp is wanted.

        Returns:
            Output [B, H, visual, D] and the natural log-sum-exp of each row [B, H, visual]; both carry gradients. The
            latter may be None if it is not wanted.
        """
        return attend_visual(
            q, k, v, lists, self.query_order, self.key_order,
            text_lens=call.text_lens, text_bias=call.text_bias, scale=call.scale, lse=lse, impl=call.impl,
        )  # fmt: skip

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        text_lens: torch.Tensor | None = None,
        text_bias: torch.Tensor | None = None,
        impl: Impl = AUTO,
        module: nn.Module | None = None,
        density_sum: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not q.shape == k.shape == v.shape or q.ndim != 4 or q.shape[2] != self.grid.tokens:
            raise DitAccelError(
                f"q, k and v must all be [batch, heads, {self.grid.tokens}, head_dim] for the grid {self.grid}; got "
                f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
            )
        kind = q.device.type
        if torch.is_autocast_enabled(kind):
            q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        call = RoutedCall(scale, text_lens, text_bias, impl, module)
        with torch.autocast(kind, enabled=False):
            visual, lists = self.attend_visual(q, k, v, call)
            if density_sum is not None:
                self.add_density(lists, density_sum)
            return self._with_others(visual, q, k, v, call)

    @torch.no_grad()
    def add_density(self, lists: BlockLists, density_sum: torch.Tensor) -> None:
        """Add a call's density, and 1 for the call, to a running sum, without waiting for the device.

        Args:
            lists: the blocks that the call attended.
            density_sum: float32 [2] on the device of the lists. The density is the attended share of all pairs, as a
                mean over samples and heads.
        """
        queries, keys = self.block_sizes(lists.indices.device)
        listed = torch.arange(lists.indices.shape[-1], device=lists.indices.device) < lists.counts[..., None]
        # entries behind a row's count may be any number
        held = torch.where(listed, keys[lists.indices.clamp(0, len(keys) - 1)], 0).sum(-1, dtype=torch.float32)
        tokens, visual = self.grid.tokens, self.grid.visual
        around = (tokens - visual) * (tokens + visual)
        share = ((held * queries).sum(-1).mean() + around) / tokens**2
        density_sum += torch.stack([share, torch.ones_like(share)])

    def prepare(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl = AUTO, *, learned: bool = False
    ) -> tuple[str, str]:
        chosen, why = impls.choose(Facts(device, dtype, head_dim, self.query_order.block, self.key_order.block), impl)
        return chosen.name, why

    def kept_keys(self, queries: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The keys in listed blocks."""
        listed = self._mask(self.route(q, k)).dense()[0, 0]
        rows, columns = (_block_of_visual(order).to(q.device) for order in (self.query_order, self.key_order))
        return among_others(listed[rows[queries]][:, columns], self.grid)

    @property
    def pairs(self) -> int | None:
        """None: the number depends on the call. A method may override this with an upper bound."""
        return None

    @property
    def visited(self) -> int | None:
        """Blocks that a head of a call attends, as an upper bound; None if not known before the call."""
        return None

    @property
    def total(self) -> int:
        """Blocks that dense attention visits."""
        return self.query_order.blocks * self.key_order.blocks

    def token_mask(self) -> torch.Tensor:
        raise DitAccelError(
            f"{self.method} has no token mask that is known before the call: it routes by content. route(q, k) returns "
            "the blocks of one call."
        )

    def block_mask(self, *args: Any, **kwargs: Any) -> BlockMask:
        raise DitAccelError(
            f"{self.method} has no block mask that is known before the call: it routes by content. route(q, k) returns "
            "the blocks of one call."
        )

    def _with_others(
        self, visual: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: RoutedCall
    ) -> torch.Tensor:
        """The whole output [B, H, N, D]: conditioning and text queries attend to everything, around `visual`."""
        order, grid = self.key_order, self.grid
        if not order.dense_blocks:
            return visual
        front, back = grid.visual_start, grid.visual_start + grid.visual
        others = torch.cat([q[:, :, :front], q[:, :, back:]], dim=2)
        bias = call.text_bias
        if bias is not None:
            bias = torch.cat([bias[:, :front], bias[:, back:]], dim=1)
        count = others.shape[2]
        rows = math.ceil(count / order.block)
        geometry = Geometry(
            grid.shape, (1, 1, count), order.block, order.block, None, order.tile, grid.conditioning, grid.text,
            own_queries=True,
        )  # fmt: skip
        every = torch.arange(order.blocks, dtype=torch.int32, device=q.device).expand(rows, -1).contiguous()
        around, _ = attend_blocks(
            others, k, v, BlockLists.full(every), geometry, Segments.of(grid, q, call.text_lens),
            text_bias=bias, scale=call.scale, impl=call.impl,
        )  # fmt: skip
        pieces = [around[:, :, :front], visual, around[:, :, front:]]
        return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1).transpose(1, 2)

    def _mask(self, lists: BlockLists) -> BlockMask:
        """Lists of visual blocks as a block mask of the visual tokens alone."""
        visual = TokenGrid(*self.grid.shape)
        orders = (TokenOrder(visual, order.block, order.tile) for order in (self.query_order, self.key_order))
        return BlockMask(lists.indices, lists.counts, torch.zeros_like(lists.indices, dtype=torch.bool), *orders)

    def block_sizes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens in each visual query block and in each visual key block, float32, on a device.

        Built at the first call, which must not be traced; `add_density` reads them.
        """
        if device not in self._sizes:
            with building():
                queries, keys = (valid_tokens(order).float().to(device) for order in (self.query_order, self.key_order))
                self._sizes[device] = queries, keys
        return self._sizes[device]


def _block_of_visual(order: TokenOrder) -> torch.Tensor:
    """The block of every visual token, in raster order: int64 [visual]."""
    with building():
        slots = order.index()[: order.visual_blocks * order.block] - order.grid.visual_start
        inside = (slots >= 0).nonzero()[:, 0]
        block = torch.empty(order.grid.visual, dtype=torch.int64)
        block[slots[inside]] = inside // order.block
        return block
