"""The definition of sparse-linear attention: masked dense attention plus the linear formula, in fp32 or fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.router.api import classify
from dit_accel.kernels.sla.arguments import EPSILON, SlaArguments, apply_map, learned_inputs
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

MAX_TOKENS = 20_000


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: SlaArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """As `portable.forward`; memory grows with the square of the tokens, so more than 20,000 are refused."""
    grid, weight, bias = call.grid, call.weight, call.bias
    if grid.tokens > MAX_TOKENS:
        raise DitAccelError(
            f"impl='reference' builds a dense mask and takes at most {MAX_TOKENS} tokens, got {grid.tokens}; "
            "use impl='portable' or 'auto'."
        )
    orders = call.query_order, call.key_order
    critical, negligible = call.lists or classify(q, k, *orders, call.topk, call.skip, call.impl)
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = valid_keys(grid, call.text_len, q.device)  # [B or 1, 1, N, 1]
    visual = grid.visual_rows
    queries = q[:, :, visual].to(wide)
    critical_map, negligible_map = (block_map(lists, call.key_order) for lists in (critical, negligible))
    exact = token_pairs(critical_map, *orders, dense=True)[:, :, visual]  # [B, H, visual, N]
    if call.text_bias is None:
        k, v = (torch.where(keys, x, 0) for x in (k, v))
        exact = exact & keys.mT
    k, v = k.to(wide), v.to(wide)
    text_bias = None if call.text_bias is None else torch.where(keys.mT, 0, call.text_bias[:, None, visual, None])
    out = masked_attention(queries, k, v, exact, text_bias, call.scale)
    rest = torch.ones_like(critical_map)
    if call.linear_scope == "marginal":
        rest = ~critical_map & ~negligible_map
    pairs = token_pairs(rest, *orders, dense=False)[:, :, visual]
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    out = out + linear_branch(queries, k, v, pairs, weight, bias, call.feature_map, call.features)
    # laid out in memory as [B, visual, H, D], as the other implementations' results are
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), critical


def linear_branch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pairs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    feature_map: str,
    features: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The projected linear attention of any queries over some pairs, in the inputs' dtype: [B, H, S, D].

    Args:
        q, k, v: [B, H, S, D], and [B, H, N, D] of all keys.
        pairs: bool [B, H, S, N].
        weight, bias, feature_map, features: as in `SlaArguments`.
    """
    a, b = (apply_map(x, feature_map) for x in learned_inputs(q, k, features))
    affinity = a @ b.mT * pairs
    return F.linear((affinity @ v) / (affinity.sum(-1, keepdim=True) + EPSILON), weight, bias)


def block_map(lists: torch.Tensor, key_order: TokenOrder) -> torch.Tensor:
    """Block lists, int32 [B, H, query blocks, n], as a map, bool [B, H, query blocks, key blocks]; visual blocks."""
    empty = torch.zeros((*lists.shape[:3], key_order.visual_blocks), dtype=torch.bool, device=lists.device)
    return empty.scatter_(-1, lists.long(), True)


def token_pairs(visual: torch.Tensor, query_order: TokenOrder, key_order: TokenOrder, *, dense: bool) -> torch.Tensor:
    """A map of visual blocks, spread over the tokens in model order: bool [B, H, N, N].

    Args:
        dense: whether conditioning and text tokens meet everything (True) or nothing (False).
    """
    pairs = F.pad(visual, (0, key_order.dense_blocks, 0, query_order.dense_blocks), value=dense)
    rows, columns = (order.block_of_token().to(visual.device) for order in (query_order, key_order))
    return pairs[..., rows, :][..., columns]


def valid_keys(grid: TokenGrid, text_len: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Tokens that are not padding text: bool [B, 1, N, 1], or [1, 1, N, 1] without `text_len`."""
    position = torch.arange(grid.tokens, device=device) - grid.text_start
    if text_len is None:
        return torch.ones_like(position, dtype=torch.bool)[None, None, :, None]
    padding = (position >= text_len.to(device)[:, None]) & (position < grid.text)
    return ~padding[:, None, :, None]
