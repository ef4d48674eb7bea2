"""Sparse-linear attention as it is defined: masked dense attention plus the linear formula, in fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.sla.features import EPSILON, apply_map
from dit_accel.kernels.sla.setting import Setting
from dit_accel.order import TokenOrder

MAX_TOKENS = 20_000


def sparse_linear_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    setting: Setting,
) -> torch.Tensor:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`; memory grows with the square of the tokens.

    Args:
        critical, skipped: block lists of the router, int32 [B, H, visual_blocks, *].

    Raises:
        DitAccelError: more than 20,000 tokens.
    """
    order, weight, bias = setting.order, setting.weight, setting.bias
    if order.grid.tokens > MAX_TOKENS:
        raise DitAccelError(
            f"impl='reference' builds a dense mask and takes at most {MAX_TOKENS} tokens, got {order.grid.tokens}; "
            "use impl='portable' or 'auto'."
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = valid_keys(order, setting.text_len, q.device)  # [B or 1, 1, N, 1]
    queries = q.to(wide)
    exact = token_pairs(block_map(critical, order), order, dense=True)  # [B, H, N, N]
    if setting.text_bias is None:
        k, v = (torch.where(keys, x, 0) for x in (k, v))
        exact = exact & keys.mT
    k, v = k.to(wide), v.to(wide)
    logits = (queries @ k.mT) * setting.scale
    if setting.text_bias is not None:
        logits = logits + torch.where(keys.mT, 0, setting.text_bias[:, None, :, None])
    out = logits.masked_fill(~exact, -torch.inf).softmax(-1) @ v
    if weight is None:
        return out.to(q.dtype)

    rest = torch.ones_like(block_map(critical, order))
    if setting.linear_scope == "marginal":
        rest = ~block_map(critical, order) & ~block_map(skipped, order)
    affinity = apply_map(queries, setting.feature_map) @ apply_map(k, setting.feature_map).mT
    affinity = affinity * token_pairs(rest, order, dense=False)
    linear = (affinity @ v) / (affinity.sum(-1, keepdim=True) + EPSILON)
    visual = torch.zeros(order.grid.tokens, 1, dtype=torch.bool, device=q.device)
    visual[order.grid.visual_start : order.grid.visual_start + order.grid.visual] = True
    projected = linear @ weight.to(wide).mT + (0 if bias is None else bias.to(wide))
    return (out + projected * visual).to(q.dtype)


def block_map(lists: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Block lists int32 [B, H, visual_blocks, n] as a map: bool [B, H, visual_blocks, visual_blocks]."""
    blocks = order.visual_blocks
    empty = torch.zeros((*lists.shape[:3], blocks), dtype=torch.bool, device=lists.device)
    return empty.scatter_(-1, lists.long(), True)


def token_pairs(visual: torch.Tensor, order: TokenOrder, *, dense: bool) -> torch.Tensor:
    """A map of visual blocks, spread over the tokens in model order: bool [B, H, N, N].

    Args:
        dense: whether conditioning and text tokens meet everything (True) or nothing (False).
    """
    extra = order.dense_blocks
    pairs = torch.nn.functional.pad(visual, (0, extra, 0, extra), value=dense)
    tokens = order.index()
    slots = (tokens >= 0).nonzero().squeeze(1)
    block_of = torch.empty(order.grid.tokens, dtype=torch.int64)
    block_of[tokens[slots]] = slots // order.block
    block_of = block_of.to(visual.device)
    return pairs[..., block_of, :][..., block_of]


def valid_keys(order: TokenOrder, text_len: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Tokens that are not padding text: bool [B, 1, N, 1], or [1, 1, N, 1] without `text_len`."""
    position = torch.arange(order.grid.tokens, device=device) - order.grid.text_start
    if text_len is None:
        return torch.ones_like(position, dtype=torch.bool)[None, None, :, None]
    padding = (position >= text_len.to(device)[:, None]) & (position < order.grid.text)
    return ~padding[:, None, :, None]
