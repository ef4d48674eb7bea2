"""The router's public functions: checks, the choice of the implementation, the custom op. README.md has the rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry
from dit_accel.kernels.cuts import visual_of
from dit_accel.kernels.impls import AUTO, Facts, Impl
from dit_accel.kernels.router.rule import RouterArguments, Rule
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid


@torch.no_grad()
def route(
    q: torch.Tensor,
    k: torch.Tensor,
    query_order: TokenOrder,
    key_order: TokenOrder,
    rule: Rule,
    *,
    scale: float | None = None,
    impl: Impl = AUTO,
) -> BlockLists:
    """The visual key blocks that every visual query block lists, by `rule`.

    Scores are products of the means of the tokens that exist, in fp32 (fp64 for fp64 input). Nothing waits for the
    device, and no gradient flows through the choice. The same input gives the same lists on every run.

    Args:
        q, k: the whole sequence in model order, [B, H, N, D], any strides; text and conditioning are not read.
        query_order, key_order: how both are cut into blocks; of one grid. Their blocks may differ in size.
        rule: what is listed.
        scale: factor of the logits; D ** -0.5 if None.
        impl: "auto", or an implementation of attention: the router's of that name, if there is one that can route such
            a call, else as "auto". All of them list the same blocks, save for rounding.

    Returns:
        Lists without tables: indices int32 [B, H, query blocks, width], ascending, 0 behind a row's count; counts int32
        [B, H, query blocks], at least 1. They differ from row to row.

    Raises:
        DitAccelError: shapes, dtypes or the rule do not fit.

    Example:
        >>> q = k = torch.randn(1, 4, 8192, 64)
        >>> order = TokenOrder(TokenGrid(8, 32, 32), 64)
        >>> route(q, k, order, order, Rule(topk=6)).indices.shape
        torch.Size([1, 4, 128, 6])
    """
    _check(q, k, query_order, key_order, rule)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    queries, keys = (visual_of(x.detach(), query_order.grid) for x in (q, k))
    return _route(queries, keys, query_order, key_order, rule, scale, impl)[0]


@torch.no_grad()
def route_pooled(
    queries: torch.Tensor, keys: torch.Tensor, rule: Rule, *, scale: float, impl: Impl = AUTO
) -> BlockLists:
    """As `route`, from one vector a block: scores are their products.

    Args:
        queries, keys: [B, H, query blocks, D] and [B, H, key blocks, D].
        rule: without cells and similarity, which need the tokens of a block.

    Raises:
        DitAccelError: the rule needs tokens, or the scale is not above 0.
    """
    if rule.cells != 1 or rule.similarity is not None:
        raise DitAccelError("Pooled blocks have no tokens left; use a rule without cells and similarity.")
    orders = single_blocks(queries), single_blocks(keys)
    return _route(queries.detach(), keys.detach(), *orders, rule, scale, impl)[0]


@torch.no_grad()
def classify(
    q: torch.Tensor,
    k: torch.Tensor,
    query_order: TokenOrder,
    key_order: TokenOrder,
    topk: int,
    skip: int,
    impl: Impl = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `topk` and the worst `skip` visual key blocks of every visual query block, by the score of block means.

    Source: SLA (arXiv 2509.24006), equations 2 and 3; thu-ml/SLA, sparse_linear_attention/utils.py. The published code
    subtracts the mean key first. This adds a constant to a row of scores and cannot change its order.

    Args:
        q, k: the whole sequence in model order, [B, H, N, D], any strides; or one vector a block, see `single_blocks`.
        query_order, key_order: how each is cut into blocks.
        topk, skip: critical and negligible blocks in every row; together at most all blocks.
        impl: as in `route`.

    Returns:
        Critical and negligible blocks, ascending: int32 [B, H, query blocks, topk] and [B, H, query blocks, skip].
    """
    if not topk and not skip:
        none = q.new_empty((*q.shape[:2], query_order.visual_blocks, 0), dtype=torch.int32)
        return none, none.clone()
    queries, keys = visual_of(q.detach(), query_order.grid), visual_of(k.detach(), key_order.grid)
    rule = Rule(topk=max(topk, 1))  # a rule lists one block at least
    lists, worst = _route(queries, keys, query_order, key_order, rule, 1.0, impl, skip)
    return lists.indices[..., :topk], worst


@torch.no_grad()
def deviations(x: torch.Tensor, order: TokenOrder, *, impl: Impl = AUTO) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean absolute deviation of the tokens of every visual block, by dimension.

    Args:
        x: the whole sequence in model order, [B, H, N, D], any strides; text and conditioning are not read.
        order: how it is cut into blocks.
        impl: as in `route`.

    Returns:
        Two tensors [B, H, blocks, D], fp32 (fp64 for fp64).
    """
    facts = Facts.of(x.device, x.dtype, x.shape[-1], order, order)
    chosen = impls.choose(facts, impls.beside(impl, facts, impls.ROUTER), impls.ROUTER)[0]
    return block_deviations(
        visual_of(x.detach(), order.grid), Geometry.of_visual(order, order).pack(), order.visual_blocks, chosen.name
    )


def single_blocks(x: torch.Tensor) -> TokenOrder:
    """The order of one vector a block, [B, H, blocks, D]: each block is one token."""
    return TokenOrder(TokenGrid(1, 1, x.shape[2]), 1)


def _route(
    q: torch.Tensor,
    k: torch.Tensor,
    query_order: TokenOrder,
    key_order: TokenOrder,
    rule: Rule,
    scale: float,
    impl: Impl,
    skip: int = 0,
) -> tuple[BlockLists, torch.Tensor]:
    """`route` of visual tokens, [B, H, visual, D], and the worst `skip` blocks of each row."""
    if not scale > 0:
        raise DitAccelError(f"The router ranks logits, whose scale is above 0; got {scale}.")
    facts = Facts.of(q.device, q.dtype, q.shape[-1], query_order, key_order, by_number=rule.by_number)
    chosen = impls.choose(facts, impls.beside(impl, facts, impls.ROUTER), impls.ROUTER)[0]
    rows = q.shape[0], q.shape[1], query_order.visual_blocks
    indices, counts, worst = route_blocks(
        q, k,
        Geometry.of_visual(query_order, key_order).pack(), rows[2],
        _per_row("topk", rule.topk, torch.int32, rows, q.device),
        _per_row("topp", rule.topp, torch.float32, rows, q.device),
        rule.forced, rule.tau, rule.variance == "exact", rule.cells, rule.similarity, scale,
        rule.width(key_order.visual_blocks), skip, chosen.name,
    )  # fmt: skip
    return BlockLists(indices, counts), worst


def _per_row(
    name: str, value: float | torch.Tensor, dtype: torch.dtype, rows: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """A part of a rule as a tensor of three dimensions, each 1 or that of `rows`; None if it lists nothing."""
    if isinstance(value, torch.Tensor):
        sizes = (1,) * (3 - value.ndim) + tuple(value.shape)
        if value.dtype != dtype or len(sizes) != 3 or any(n not in (1, m) for n, m in zip(sizes, rows, strict=True)):
            raise DitAccelError(
                f"{name} is a number or {dtype} that broadcasts to {list(rows)}; got {value.dtype} {list(value.shape)}."
            )
        return value.to(device).view(sizes)
    return torch.full((1, 1, 1), value, dtype=dtype, device=device) if value else None


def _check(q: torch.Tensor, k: torch.Tensor, query_order: TokenOrder, key_order: TokenOrder, rule: Rule) -> None:
    grid = key_order.grid
    if query_order.grid != grid:
        raise DitAccelError(f"Queries and keys are of one grid; got {query_order.grid} and {grid}.")
    if q.shape != k.shape or q.ndim != 4 or q.shape[2] != grid.tokens:
        raise DitAccelError(
            f"q and k must be [batch, heads, {grid.tokens}, head_dim], both alike, for the grid {grid}; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise DitAccelError(f"q and k must share one floating dtype, got {q.dtype} and {k.dtype}.")
    for order in (query_order, key_order):
        if order.block % rule.cells:
            raise DitAccelError(f"A block of {order.block} tokens is not cut into {rule.cells} equal cells.")
    want = query_order.visual_blocks, key_order.visual_blocks
    forced = rule.forced
    if forced is not None and (tuple(forced.shape) != want or forced.dtype != torch.bool or forced.device != q.device):
        raise DitAccelError(
            f"forced must be bool {list(want)} on {q.device}, got {forced.dtype} {list(forced.shape)} on "
            f"{forced.device}."
        )


@torch.library.custom_op("dit_accel::route_blocks", mutates_args=())
def route_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    geometry: Sequence[int],
    blocks: int,
    counts: torch.Tensor | None,
    shares: torch.Tensor | None,
    forced: torch.Tensor | None,
    tau: float | None,
    exact: bool,
    cells: int,
    similarity: float | None,
    scale: float,
    width: int,
    skip: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `reference.route` returns; no gradient flows.

    Args:
        q, k: visual tokens in raster order, [B, H, visual, D].
        geometry, blocks: of the visual tokens alone, as `Geometry.pack` returns it, and its blocks of queries.
        counts, shares, forced, tau, exact, cells, similarity, scale, width, skip: as in `RouterArguments`.
        impl: the name of an implementation.
    """
    orders = Geometry.unpack(geometry).orders
    call = RouterArguments(*orders, counts, shares, forced, tau, exact, cells, similarity, scale, width, skip)
    return impls.named(impl, impls.ROUTER).load().route(q, k, call)


@route_blocks.register_fake
def _(q, k, geometry, blocks, counts, shares, forced, tau, exact, cells, similarity, scale, width, skip, impl):
    rows = *q.shape[:2], blocks
    return tuple(q.new_empty(shape, dtype=torch.int32) for shape in ((*rows, width), rows, (*rows, skip)))


@torch.library.custom_op("dit_accel::block_deviations", mutates_args=())
def block_deviations(
    x: torch.Tensor, geometry: Sequence[int], blocks: int, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.deviations` returns; arguments as of `route_blocks`."""
    return impls.named(impl, impls.ROUTER).load().deviations(x, Geometry.unpack(geometry).key_order)


@block_deviations.register_fake
def _(x, geometry, blocks, impl):
    shape, dtype = (*x.shape[:2], blocks, x.shape[3]), torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(shape, dtype=dtype) for _ in range(2))
