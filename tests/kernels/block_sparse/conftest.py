"""Block-sparse problems for all tests of this folder."""

import collections
import dataclasses
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from block_sparse_calls import block_sparse_attention
from roundings import gradient_sizes

import dit_accel
from dit_accel.kernels import impls, obstacles
from dit_accel.kernels.block_sparse import reference
from dit_accel.kernels.block_sparse.geometry import (
    BlockLists,
    Geometry,
    Segments,
    query_placement,
    read_placements,
)
from dit_accel.order import TokenOrder

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass
class Problem:
    """Tensors of one call, and what plain PyTorch makes of it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lists: tuple[torch.Tensor, torch.Tensor]
    options: dict
    grad_out: torch.Tensor
    grad_lse: torch.Tensor

    @property
    def scale(self) -> float:
        scale = self.options.get("scale")
        return self.q.shape[-1] ** -0.5 if scale is None else scale

    def call(self, impl: str, dtype: torch.dtype | None = None, **options):
        q, k, v = (x.to(dtype or x.dtype) for x in (self.q, self.k, self.v))
        return block_sparse_attention(q, k, v, *self.lists, impl=impl, **(self.options | options))

    def results(self, attend: Callable, dtype: torch.dtype, lse_gradient: bool = True) -> dict[str, torch.Tensor]:
        """Output, LSE and gradients of attend(q, k, v) -> out, lse in a dtype; LSE of blind rows as 0."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out, lse = attend(*leaves)
        seen = lse.masked_fill(lse == float("-inf"), 0.0)
        loss = (out * self.grad_out.to(dtype)).sum()
        if lse_gradient:
            loss = loss + (seen * self.grad_lse.to(seen.dtype)).sum()
        return dict(zip(NAMES, (out.detach(), seen.detach(), *torch.autograd.grad(loss, leaves)), strict=True))

    def to(self, device: str) -> "Problem":
        def moved(value):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        tensors = {name: moved(getattr(self, name)) for name in ("q", "k", "v", "grad_out", "grad_lse")}
        options = {name: moved(value) for name, value in self.options.items()}
        return dataclasses.replace(self, lists=tuple(map(moved, self.lists)), options=options, **tensors)

    def run(self, impl: str, dtype: torch.dtype, lse_gradient: bool = True) -> dict[str, torch.Tensor]:
        """Results of an implementation, on the CPU; the kernels run on a GPU where there is one."""
        here = self.to("cuda") if impl not in ("reference", "portable") and torch.cuda.is_available() else self

        def attend(q, k, v):
            return block_sparse_attention(q, k, v, *here.lists, impl=impl, return_lse=True, **here.options)

        return {name: result.cpu() for name, result in here.results(attend, dtype, lse_gradient).items()}

    def plain(self, dtype: torch.dtype, lse_gradient: bool = True) -> dict[str, torch.Tensor]:
        return self.results(lambda q, k, v: plain_attention(q, k, v, self.mask(), self.scale), dtype, lse_gradient)

    def geometry(self) -> Geometry:
        options = self.options
        return Geometry(
            options["grid"], options.get("query_grid") or options["grid"], options["block_q"], options["block_k"],
            options.get("tile_q"), options.get("tile_k"), options.get("conditioning", 0), options.get("text", 0),
            options.get("query_grid") is not None, options.get("partial_blocks"),
        )  # fmt: skip

    def block_lists(self) -> BlockLists:
        return BlockLists(*self.lists, self.options.get("partial"), self.options.get("tables"))

    def segments(self) -> Segments:
        return Segments(*map(self.options.get, Segments._fields))

    def mask(self) -> torch.Tensor:
        """Token mask in memory order: bool [B, H or 1, Nq, Nk]."""
        geometry = self.geometry()
        places = read_placements(geometry, len(self.q), self.k.shape[2], self.segments())
        mask = reference.token_mask(self.block_lists(), geometry)
        grid_q, grid_k = geometry.query_order.grid, geometry.key_order.grid
        masks = []
        for b, place in enumerate(places):
            rows = query_placement(geometry, place).positions(grid_q)
            columns = place.positions(grid_k)
            valid = torch.arange(len(columns)) < grid_k.visual + grid_k.conditioning + place.text_len
            sample = (mask[b] if mask.ndim == 4 else mask[None]) & valid
            full = torch.zeros(len(sample), self.q.shape[2], self.k.shape[2], dtype=torch.bool)
            full[:, rows[:, None], columns] = sample
            masks.append(full)
        return torch.stack(masks)

    def magnitudes(self, exact: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sizes of the terms in the gradients; see `gradient_sizes`."""
        q, k, v, grad_out = (x.double() for x in (self.q, self.k, self.v, self.grad_out))
        logits = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~self.mask(), float("-inf"))
        return gradient_sizes(
            q, k, v, grad_out, exact["out"], logits, exact["lse"], self.scale, self.q.dtype, self.grad_lse.double()
        )

    def check(self, impl: str, dtype: torch.dtype, lse_gradient: bool = True) -> None:
        """Hold an implementation against the reference in fp64 by the error of plain PyTorch in `dtype`."""
        rounded = dataclasses.replace(
            self, **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "grad_out", "grad_lse")}
        )
        exact = rounded.run("reference", torch.float64, lse_gradient)
        plain, got = rounded.plain(dtype, lse_gradient), rounded.run(impl, dtype, lse_gradient)
        magnitudes = rounded.magnitudes(exact)
        for name in NAMES:
            assert_accurate(name, got[name], plain[name], exact[name], magnitudes.get(name))


def _starts(grid: dit_accel.TokenGrid, batch: int, between: bool, per_sample: bool, gap: int) -> dict:
    """Where segments begin: in model order, or visual, text, conditioning; shifted from sample to sample into `gap`."""
    if between:
        starts = 0, grid.visual + grid.text, grid.visual
    else:
        starts = grid.visual_start, grid.conditioning_start, grid.text_start
    shift = torch.arange(batch, dtype=torch.int32) % (gap + 1) if per_sample else torch.zeros(batch, dtype=torch.int32)
    names = ("visual_start", "conditioning_start", "text_start")
    return {name: shift + start for name, start in zip(names, starts, strict=True)}


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """Makes a problem from a method's plan, from random lists per head (`topk`), or for queries of their own.

    `per_head` gives a plan's lists to each head of each sample, of which every one leaves out another block.
    """

    def make(
        shape=(1, 1, 64), method=None, config=None, *, batch=1, heads=2, dim=16, text=0, text_first=False,
        conditioning=0, block_q=16, block_k=16, tile_q=None, tile_k=None, topk=None, query_grid=None, text_lens=None,
        between=False, per_sample=False, per_head=False, gap=0, size=1.0, scale=None, seed=0,
    ) -> Problem:  # fmt: skip
        torch.manual_seed(seed)
        grid = dit_accel.TokenGrid(*shape, text=text, text_first=text_first, conditioning=conditioning)
        key_order = TokenOrder(grid, block_k, tile_k)
        options = {"grid": shape, "block_q": block_q, "block_k": block_k, "tile_q": tile_q, "tile_k": tile_k}
        options |= {"text": text, "conditioning": conditioning, "query_grid": query_grid, "scale": scale}
        options |= _starts(grid, batch, between, per_sample, gap)
        if text_lens is not None:
            options["text_len"] = torch.tensor(text_lens, dtype=torch.int32)
        query_order = TokenOrder(grid if query_grid is None else dit_accel.TokenGrid(*query_grid), block_q, tile_q)
        if method is not None:
            plan = dit_accel.plan(method, grid, **(config or {}))
            sizes = {"order": "raster"} if tile_q is None else {"tile_q": tile_q, "tile_k": tile_k}
            mask = plan.block_mask(block_q=block_q, block_k=block_k, **sizes)
            lists, partial = (mask.kv_indices, mask.kv_counts), mask.partial
            if per_head:
                places = torch.arange(batch * heads)[:, None] % mask.kv_counts.clamp(min=1)
                remaining = torch.arange(mask.kv_indices.shape[-1]) != places[..., None]
                order = remaining.int().sort(dim=-1, descending=True, stable=True).indices.unflatten(0, (batch, heads))
                indices, partial = (x.expand(order.shape).gather(-1, order) for x in (mask.kv_indices, partial))
                lists = indices, (mask.kv_counts - 1).clamp(min=0).expand(order.shape[:-1]).contiguous()
            used = torch.arange(partial.shape[-1]) < lists[1][..., None]
            options |= {"partial": partial, "tables": plan.mask.pack(), "partial_blocks": int((partial & used).sum())}
        else:
            leading = () if topk is None else (batch, heads)
            width = key_order.blocks if topk is None else min(topk, key_order.blocks)
            scores = torch.rand(*leading, query_order.blocks, key_order.blocks)
            indices = scores.topk(width, -1).indices.sort(-1).values.int()
            lists = indices, torch.full(indices.shape[:-1], width, dtype=torch.int32)
        queries = query_order.grid.tokens + (gap if query_grid is None else 0)
        q, grad_out = (torch.randn(batch, heads, queries, dim) for _ in range(2))
        k, v = (torch.randn(batch, heads, grid.tokens + gap, dim) for _ in range(2))
        grad_lse = torch.randn(batch, heads, queries)
        return Problem(q * size, k * size, v * size, lists, options, grad_out, grad_lse)

    return make


@pytest.fixture
def emulate(monkeypatch):
    """Runs the forward of "gluon" under the emulator, where no GPU runs it.

    A test may ask for an order of events or a kernel.
    """
    calls = pytest.importorskip("gluon_calls")
    gluon = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.launches")
    triton = pytest.importorskip("dit_accel.kernels.block_sparse.triton")
    stock = gluon.block_sparse_gluon_fwd_kernel

    def use(kernel=stock, **options):
        monkeypatch.setattr(gluon, "block_sparse_gluon_fwd_kernel", calls.Emulated(kernel, **options))

    if not calls.NATIVE:
        monkeypatch.setattr(gluon, "multiprocessors", lambda _: 2)
        for row in (impls.named("gluon"), impls.named("gluon_triton")):
            key = row.kernel, row.name
            monkeypatch.setitem(impls._TABLE, key, dataclasses.replace(row, cannot=obstacles.nothing))
        monkeypatch.setattr(triton, "partial_words_kernel", collections.defaultdict(lambda: calls.write_words))
        use()
    return use
