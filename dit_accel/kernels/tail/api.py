"""The tail: key blocks that are not attended exactly are a pseudo-key each. README.md has the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, cut_blocks, empty_rows
from dit_accel.kernels.cuts import visual_of
from dit_accel.kernels.gradients import register_gradients
from dit_accel.kernels.impls import AUTO, Facts, Impl
from dit_accel.kernels.tail.portable import correction
from dit_accel.kernels.tail.reference import TailCall
from dit_accel.order import TokenOrder

# A traced call can only take modules that are loaded.
for _row in impls.ROWS:
    if _row.kernel == impls.TAIL and _row.package is None:
        _row.load()


def with_tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    exact_lse: Tensor,
    lists: BlockLists,
    query_order: TokenOrder,
    key_order: TokenOrder,
    *,
    dropped: Tensor | None = None,
    first_order: bool = False,
    scale: float | None = None,
    impl: Impl = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention of the visual queries over listed blocks, with the tail of all other visual blocks merged into it.

    A block of n keys in the tail counts as one key, the mean of its keys, with weight n. Its value is the mean of its
    values. The mass is conserved: equal values come out unchanged. Differentiable in q, k, v, `exact` and `exact_lse`.

    Source: Sol-Attn (arXiv 2607.24027), its zeroth-order tail with a weight per query; PISA (arXiv 2602.01077) for
    `first_order`.

    Args:
        q, k, v: [B, H, N, D] in model order, any strides; the whole sequence.
        exact, exact_lse: attention of the visual queries over the listed blocks, conditioning and text:
            [B, H, visual, D], and its natural log-sum-exp [B, H, visual].
        lists: the visual key blocks that `exact` attended, int32 [B, H, query blocks, width].
        query_order, key_order: how both sides are cut into blocks; of one grid.
        dropped: bool [B, H, query blocks, key blocks], blocks that are in the tail of no query of that block although
            they are not listed. None: no block is dropped.
        first_order: add PISA's first-order term, one D x D matrix a head.
        scale: factor of the logits; D ** -0.5 if None.
        impl: "auto", or the name of an implementation, which runs or raises; as "auto" if it is one of attention alone.

    Returns:
        The output [B, H, visual, D] in the dtype of q, laid out as [B, visual, H, D] in memory. Its natural log-sum-exp
        [B, H, visual].

    Raises:
        DitAccelError: a shape does not fit, or `impl` cannot run here.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = (visual_of(x, key_order.grid) for x in (q, k, v))
    geometry = Geometry.of_visual(query_order, key_order)
    call = TailCall(q, k, v, exact, exact_lse, lists, dropped, geometry, scale)
    _check(call)
    facts = Facts.of(q.device, q.dtype, q.shape[-1], query_order, key_order)
    chosen, _ = impls.choose(facts, impls.beside(impl, impls.TAIL), impls.TAIL)
    if chosen.cut(facts):
        lists, geometry = cut_blocks(lists, geometry, chosen.cuts)
        if dropped is not None:
            dropped = dropped[:, :, query_order.cut(geometry.block_q, q.device)[1][: geometry.query_order.blocks]]
        call = call._replace(lists=lists, dropped=dropped, geometry=geometry)
    if chosen.autograd:
        out, lse = chosen.load().forward(call)
    else:
        out, lse = tail_forward(
            q, k, v, exact, exact_lse, lists.indices, lists.counts, dropped, geometry.pack(), scale, chosen.name
        )
    return (with_first_order(out, lse, exact_lse, q, k, v, geometry.key_order, scale) if first_order else out), lse


def with_first_order(
    out: Tensor, lse: Tensor, exact_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, key_order: TokenOrder, scale: float
) -> Tensor:
    """The output of a tail with PISA's first-order term, which grows with the tail's share of a row.

    Args:
        out, lse: of the exact part and the tail, [B, H, visual, D] and [B, H, visual].
        exact_lse: of the exact part.
        q, k, v, key_order, scale: as of `correction`.
    """
    share = -torch.expm1(exact_lse - lse)[..., None]
    return out + (share * correction(q, k, v, key_order, scale)).to(out.dtype)


def _check(call: TailCall) -> None:
    q, k, v, exact, exact_lse, lists, dropped, geometry, _ = call
    visual, blocks = geometry.key_order.grid.visual, (geometry.query_order.blocks, geometry.key_order.blocks)
    if not q.shape == k.shape == v.shape == exact.shape or q.ndim != 4 or q.shape[2] != visual:
        raise DitAccelError(
            f"The tail needs q, k and v with {visual} visual tokens and the exact output [B, H, {visual}, D]; got "
            f"visual parts {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and the output {tuple(exact.shape)}."
        )
    if exact_lse.shape != q.shape[:3]:
        raise DitAccelError(f"exact_lse must be {list(q.shape[:3])}, got {tuple(exact_lse.shape)}.")
    rows = (*q.shape[:2], blocks[0])
    if tuple(lists.indices.shape[:-1]) != rows or tuple(lists.counts.shape) != rows:
        raise DitAccelError(
            f"The tail needs lists {[*rows, 'width']} and counts {list(rows)}, got {tuple(lists.indices.shape)} and "
            f"{tuple(lists.counts.shape)}."
        )
    if dropped is not None and (dropped.shape != (*q.shape[:2], *blocks) or dropped.dtype != torch.bool):
        raise DitAccelError(
            f"dropped must be bool {[*q.shape[:2], *blocks]}, got {dropped.dtype} {tuple(dropped.shape)}."
        )


@torch.library.custom_op("dit_accel::tail", mutates_args=())
def tail_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    exact_lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    dropped: Tensor | None,
    geometry: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, visual, D], laid out in memory as [B, visual, H, D], and LSE [B, H, visual]; see `with_tail`."""
    lists = BlockLists(indices, counts)
    call = TailCall(q, k, v, exact, exact_lse, lists, dropped, Geometry.unpack(geometry), scale)
    return impls.named(impl, impls.TAIL).load().forward(call)


@tail_forward.register_fake
def _(q, k, v, exact, exact_lse, *rest):
    return empty_rows(exact), torch.empty_like(exact_lse, memory_format=torch.contiguous_format)


@torch.library.custom_op("dit_accel::tail_backward", mutates_args=())
def tail_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tensors: Sequence[Tensor | None],
    geometry: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and `exact`, each laid out in memory as [B, visual, H, D], and of `exact_lse`.

    `tensors` are those of `tail_forward`.
    """
    *taken, indices, counts, dropped = tensors
    call = TailCall(*taken, BlockLists(indices, counts), dropped, Geometry.unpack(geometry), scale)  # type: ignore
    return impls.named(impl, impls.TAIL).load().backward(grad_out, grad_lse, out, lse, call)


@tail_backward.register_fake
def _(grad_out, grad_lse, out, lse, tensors, *rest):
    return *(empty_rows(x) for x in tensors[:4]), torch.empty_like(tensors[4])


register_gradients(tail_forward, tail_backward)
