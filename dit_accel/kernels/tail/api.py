"""The tail: key blocks that are not attended exactly are a pseudo-key each. README.md has the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import (
    attend_padding,
    attend_visual,
    check_bias,
    check_call,
    gradients_follow,
    in_autocast_dtype,
    merge,
    visual_call,
)
from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry, empty_rows
from dit_accel.kernels.cuts import contiguous_rows, visual_of
from dit_accel.kernels.gradients import register_gradients
from dit_accel.kernels.impls import AUTO, Facts, Impl
from dit_accel.kernels.tail.ops import attention_with_tail
from dit_accel.kernels.tail.portable import correction
from dit_accel.kernels.tail.reference import TailInputs
from dit_accel.order import TokenOrder

# A traced call can only take modules that are loaded; none of these imports Triton.
for _row in impls.ROWS:
    if _row.kernel == impls.TAIL:
        _row.load()


def attend_with_tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    query_order: TokenOrder,
    key_order: TokenOrder,
    *,
    dropped: Tensor | None = None,
    text_lens: Tensor | None = None,
    text_bias: Tensor | None = None,
    scale: float | None = None,
    share: bool = False,
    impl: Impl = AUTO,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of the visual queries over listed blocks, conditioning and text, with the tail of all other blocks.

    A block of n keys in the tail counts as one key, the mean of its keys, with weight n. Its value is the mean of its
    values. The mass is conserved: equal values come out unchanged. Differentiable in q, k and v.

    An implementation of attention that takes the tail (`impls.Implementation.takes_tail`) computes both in one kernel.
    Otherwise `with_tail` follows.

    Source: Sol-Attn (arXiv 2607.24027), its zeroth-order tail with a weight per query.

    Args:
        q, k, v: [B, H, N, D] in model order, any strides; the whole sequence.
        lists: visual key blocks that are attended exactly, int32 [B, H, query blocks, width], without tables.
        query_order, key_order: how both sides are cut into blocks; of one grid.
        dropped: bool [B, H, query blocks, key blocks], blocks that are in the tail of no query of that block although
            they are not listed. None: no block is dropped.
        text_lens, text_bias, scale: as of `block_sparse.api.attend_visual`.
        share: the last result is wanted.
        impl: "auto", or the name of an implementation of attention, which runs or raises.

    Returns:
        The output [B, H, visual, D] in the dtype of q, laid out as [B, visual, H, D] in memory. Its natural log-sum-exp
        [B, H, visual]. The tail's share of every row's weights [B, H, visual], None unless `share` asks for it.

    Raises:
        DitAccelError: a shape does not fit, the lists have tables, or `impl` cannot run here.
    """
    q, k, v = (contiguous_rows(x) for x in in_autocast_dtype(q, k, v))
    gradients = gradients_follow(q, k, v)
    facts = Facts.of(q.device, q.dtype, q.shape[-1], query_order, key_order, gradients=gradients, lse=True)
    chosen, _ = impls.choose(facts, impl)
    if not chosen.takes_tail(facts):
        exact, exact_lse = attend_visual(
            q, k, v, lists, query_order, key_order, text_lens=text_lens, text_bias=text_bias, scale=scale, lse=True,
            impl=impl,
        )  # fmt: skip
        assert exact_lse is not None
        out, lse = with_tail(
            q, k, v, exact, exact_lse, lists, query_order, key_order, dropped=dropped, scale=scale, impl=impl
        )
        rest = (exact_lse - lse).masked_fill(lse == -torch.inf, 0.0)  # a row without keys has a share of 0
        return out, lse, -torch.expm1(rest) if share else None
    visual, scale = key_order.grid.visual_rows, q.shape[-1] ** -0.5 if scale is None else float(scale)
    queries, listed, geometry, segments = visual_call(q, lists, query_order, key_order, text_lens)
    call, bias = BlockSparseInputs(queries, k, v, listed, segments, geometry, scale), None
    check_call(call)
    if text_bias is not None:
        bias = text_bias[:, visual]
        check_bias(call, bias)
    _check_tail(q, lists, dropped, query_order, key_order)
    out, lse, part = attention_with_tail(
        queries, k, v, listed.indices, listed.counts, dropped, segments.text_len, geometry.pack(), scale, share,
        chosen.name,
    )  # fmt: skip
    if bias is not None and geometry.text:
        before = lse
        out, lse = merge(out, lse, *attend_padding(call, chosen.name), bias)
        part = part * torch.exp(before - lse) if share else part
    return out, lse, part if share else None


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
    scale: float | None = None,
    impl: Impl = AUTO,
) -> tuple[Tensor, Tensor]:
    """An exact part with the tail merged into it. Differentiable in q, k, v, `exact` and `exact_lse`.

    Args:
        exact, exact_lse: attention of the visual queries over the listed blocks, conditioning and text:
            [B, H, visual, D], and its natural log-sum-exp [B, H, visual].
        lists: the visual key blocks that `exact` attended, int32 [B, H, query blocks, width].
        impl: the name of attention's implementation, which is taken where it can compute the tail; else "auto".

    Other arguments, results and errors as of `attend_with_tail`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = (contiguous_rows(visual_of(x, key_order.grid)) for x in (q, k, v))
    geometry = Geometry.of_visual(query_order, key_order)
    call = TailInputs(q, k, v, exact, exact_lse, lists, dropped, geometry, scale)
    _check(call)
    gradients = gradients_follow(q, k, v, exact, exact_lse)
    facts = Facts.of(q.device, q.dtype, q.shape[-1], query_order, key_order, gradients=gradients)
    chosen, _ = impls.choose(facts, impls.beside(impl, facts, impls.TAIL), impls.TAIL)
    if chosen.autograd:
        return chosen.load().forward(call)
    return tail_forward(
        q, k, v, exact, exact_lse, lists.indices, lists.counts, dropped, geometry.pack(), scale, chosen.name
    )


def with_first_order(
    out: Tensor, share: Tensor, q: Tensor, k: Tensor, v: Tensor, key_order: TokenOrder, scale: float | None
) -> Tensor:
    """The output of a tail with PISA's first-order term, one D x D matrix a head.

    Source: PISA (arXiv 2602.01077).

    Args:
        out, share: as from `attend_with_tail`.
        q, k, v: [B, H, N, D], the whole sequence.
        scale: of the logits; D ** -0.5 if None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = (visual_of(x, key_order.grid) for x in (q, k, v))
    visual = Geometry.of_visual(key_order, key_order).key_order
    return out + (share[..., None] * correction(q, k, v, visual, scale)).to(out.dtype)


def _check(call: TailInputs) -> None:
    q, k, v, exact, exact_lse, lists, dropped, geometry, _ = call
    visual = geometry.key_order.grid.visual
    if not q.shape == k.shape == v.shape == exact.shape or q.ndim != 4 or q.shape[2] != visual:
        raise DitAccelError(
            f"The tail needs q, k and v with {visual} visual tokens and the exact output [B, H, {visual}, D]; got "
            f"visual parts {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and the output {tuple(exact.shape)}."
        )
    if exact_lse.shape != q.shape[:3]:
        raise DitAccelError(f"exact_lse must be {list(q.shape[:3])}, got {tuple(exact_lse.shape)}.")
    _check_tail(q, lists, dropped, geometry.query_order, geometry.key_order)


def _check_tail(
    q: Tensor, lists: BlockLists, dropped: Tensor | None, query_order: TokenOrder, key_order: TokenOrder
) -> None:
    blocks = query_order.visual_blocks, key_order.visual_blocks
    rows = (*q.shape[:2], blocks[0])
    if lists.tables is not None:
        raise DitAccelError(
            "The tail takes whole blocks as listed or not, and these lists have tables, which take parts of blocks. "
            "Give lists without tables."
        )
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
    call = TailInputs(q, k, v, exact, exact_lse, lists, dropped, Geometry.unpack(geometry), scale)
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
    call = TailInputs(*taken, BlockLists(indices, counts), dropped, Geometry.unpack(geometry), scale)  # type: ignore
    return impls.named(impl, impls.TAIL).load().backward(grad_out, grad_lse, out, lse, call)


@tail_backward.register_fake
def _(grad_out, grad_lse, out, lse, tensors, *rest):
    return *(empty_rows(x) for x in tensors[:4]), torch.empty_like(tensors[4])


register_gradients(tail_forward, tail_backward)
