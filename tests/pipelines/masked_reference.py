"""Any transformer with its self-attention replaced, without our code: what accelerated models are held against."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import TinyModel, run
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel.plans.routed import RoutedPlan
from dit_accel.tokens import TokenGrid

# Gets q, k, v [B, H, N, D] and returns which pairs attend, bool, broadcastable to [B, H, N, N].
Pairs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class MaskedAttention(TorchFunctionMode):
    """Self-attention over the grid attends to the pairs that both `pairs` and the model allow.

    Self-attention is told by its length. A model that cuts padded text off, sample by sample, makes shorter calls.

    Args:
        tiny: whose grid and lengths these are.
        pairs: decides.
        double: compute it in float64, whatever comes.

    Attributes:
        calls: replaced so far.
    """

    def __init__(self, tiny: TinyModel, pairs: Pairs, double: bool = False) -> None:
        super().__init__()
        self.pairs, self.calls, self.double = pairs, 0, double
        self.grid, self.queries = tiny.grid, tiny.queries
        self.shortest, self.longest = tiny.lengths or (tiny.grid.tokens - tiny.grid.text, tiny.grid.tokens)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **rest: Any
    ) -> torch.Tensor:
        tokens = key.shape[-2]
        if query.shape[-2] == (self.queries or tokens) and self.shortest <= tokens <= self.longest:
            self.calls += 1
            pairs = self._pairs(query, key, value)
            if attn_mask is None:
                attn_mask = pairs
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & pairs
            else:
                attn_mask = torch.where(pairs, attn_mask, float("-inf"))
            if self.double:
                wide = (tensor.double() for tensor in (query, key, value))
                return F.scaled_dot_product_attention(*wide, attn_mask, dropout_p, **rest).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **rest)

    def _pairs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.queries is None:
            return self.pairs(query, key, value)
        text = self.grid.text
        every = F.pad(query, (0, 0, text, 0) if self.grid.text_first else (0, 0, 0, text))
        pairs = self.pairs(every, key, value)
        rows = slice(text, None) if self.grid.text_first else slice(self.queries)
        return pairs if pairs.shape[-2] == 1 else pairs[..., rows, :]


def plain_and_exact(tiny: TinyModel, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """The model with masked attention in fp32 and in fp64, both on the pairs that `pairs` gave in fp32."""
    recorded = []

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        recorded.append(pairs(q, k, v))
        return recorded[-1]

    with MaskedAttention(tiny, record) as mode:
        plain = run(tiny.shared, tiny.call())
    assert mode.calls, "the model made no attention call of the grid's length"
    replay = iter(recorded)
    with MaskedAttention(tiny, lambda *_: next(replay), double=True):
        exact = run(tiny.shared_double, tiny.double_call())
    return plain, exact


def static_pairs(mask: torch.Tensor, rows: torch.Tensor | None = None, visual: torch.Tensor | None = None) -> Pairs:
    """A token mask [tokens, tokens] in the grid's order; shorter calls lack the end of the text, which stands last.

    `rows`: as `TinyModel.rows`; `visual`: the mask of calls with the visual tokens alone.
    """
    if rows is not None:
        mask = torch.stack([mask[order][:, order] for order in rows.argsort(1)])[:, None]

    def pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = q.shape[-2]
        return visual if visual is not None and tokens == len(visual) else mask[..., :tokens, :tokens]

    return pairs


def listed_pairs(method: str, grid: TokenGrid, config: dict[str, Any], rows: torch.Tensor | None = None) -> Pairs:
    """The pairs in the blocks that a routed method lists; text and reference tokens attend to everything."""

    def pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if rows is not None:
            back = rows.argsort(1)[:, None]
            in_grid = in_order(*(x.take_along_dim(rows[:, None, :, None], 2) for x in (q, k)))
            return in_grid.take_along_dim(back[..., None], 2).take_along_dim(back[..., None, :], 3)
        return in_order(q, k)

    def in_order(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        tokens = q.shape[-2]
        in_call = dataclasses.replace(grid, text=0, conditioning=0)
        if tokens != grid.visual:
            in_call = dataclasses.replace(grid, text=grid.text - (grid.tokens - tokens))
        plan, queries = dit_accel.plan(method, in_call, **config), torch.arange(grid.visual)
        assert isinstance(plan, RoutedPlan)
        mask = torch.ones(*q.shape[:2], tokens, tokens, dtype=torch.bool)
        for sample in range(len(q)):
            lists = plan.route(q[sample : sample + 1], k[sample : sample + 1])
            for head in range(q.shape[1]):
                mask[sample, head, queries + in_call.visual_start] = plan.kept_keys(queries, lists, head)
        return mask

    return pairs


def assert_no_worse(
    output: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, coarsest: torch.dtype | None = None
) -> None:
    """At most twice the error of PyTorch in the same dtype, both against fp64, plus one rounding band.

    `coarsest` is what the model itself rounds to on its way, where that is less than the result's dtype: there a
    difference in the last bit of fp32 may come out as one unit of the coarser one.
    """
    band = torch.finfo(coarsest or plain.dtype).eps * exact.abs().max().item()
    error, allowed = ((result.double() - exact).abs().max().item() for result in (output, plain))
    assert error <= 2 * (allowed + band), f"error {error:.2e}, plain PyTorch {allowed:.2e}, rounding band {band:.2e}"
