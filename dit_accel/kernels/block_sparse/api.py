"""Block-sparse attention: the function behind every static method and the exact part of every routed one.

`impls.choose` chooses the implementation. The custom ops are opaque to `torch.compile`, with fake kernels for tracing
and the backward. Their signatures are flat; all other code passes one record of a call.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.utils._python_dispatch import is_in_torch_dispatch_mode as traced

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import (
    BlockLists,
    BlockSparseInputs,
    Geometry,
    Segments,
    cut_blocks,
    empty_rows,
)
from dit_accel.kernels.block_sparse.pieces import in_pieces, merged, pieces_of
from dit_accel.kernels.cuts import contiguous_rows, visual_of
from dit_accel.kernels.gradients import register_gradients
from dit_accel.kernels.impls import AUTO, Facts, Impl, Implementation, choose, named
from dit_accel.order import TokenOrder

WHOLE = Segments()


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    geometry: Geometry,
    segments: Segments = WHOLE,
    *,
    text_bias: Tensor | None = None,
    scale: float | None = None,
    lse: bool = False,
    few: bool = False,
    impl: Impl = AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention in which each block of queries visits only its listed blocks of keys.

    Blocks are those of `order.TokenOrder`: visual blocks (raster runs or 3-D tiles), conditioning blocks, text blocks.
    Each segment is padded to whole blocks. Padding slots are never attended.

    Args:
        q: queries [B, H, Nq, D], any strides; bfloat16, float16, float32 or float64.
        k, v: keys and values [B, H, Nk, D], any strides; dtype and device as q.
        lists, geometry, segments: what is listed, how both sides are cut, and where a sample's segments lie.
        text_bias: floating point [B, Nq], added to each query's scaled logits of the text behind `segments.text_len`,
            which then stays a key of every query. Needs `text_len`.
        scale: factor on the logits; None: D ** -0.5.
        lse: the natural logarithm of each row's sum of exponentials is wanted. Its gradient flows.
        few: the lists are few and long, so that they may be attended in `pieces`. Needs queries of their own in raster
            order, lists without tables, and a key for each query.
        impl: "auto", or the name of an implementation (`impls.ROWS`), which runs or raises.

    Returns:
        The output [B, H, Nq, D] in q's dtype, contiguous as [B, Nq, H, D]. The LSE [B, H, Nq] in float32 (float64 for
        float64); without `lse` it may be None. A query that sees no key has output 0 and LSE -inf.

    Raises:
        DitAccelError: an argument has the wrong shape, dtype or device, or `impl` cannot run here.

    Source:
        Online softmax with a log-sum-exp per row: Dao et al., FlashAttention (arXiv:2205.14135), Algorithms 1 and 4.
        The incoming gradient of the LSE is added to dP before delta is subtracted.
    """
    q, k, v = in_autocast_dtype(q, k, v)
    call = BlockSparseInputs(q, k, v, lists, segments, geometry, 1.0 if scale is None else float(scale))
    check_call(call)
    check_bias(call, text_bias)
    if scale is None:
        call = call._replace(scale=q.shape[-1] ** -0.5)
    gradients = gradients_follow(q, k, v)
    wanted = lse or text_bias is not None
    facts = Facts(q.device, q.dtype, q.shape[-1], geometry.block_q, geometry.block_k, gradients, wanted)
    chosen, _ = choose(facts, impl)
    lists, geometry = cut_blocks(lists, geometry, chosen.cuts)
    call = call._replace(lists=lists if chosen.packing else lists._replace(packed=None), geometry=geometry)
    pieces = pieces_of(call, chosen) if few else 1
    out, sums = attend_checked(chosen, in_pieces(call, pieces) if pieces > 1 else call, gradients)
    if pieces > 1:
        assert sums is not None
        out, sums = merged(out, sums, pieces)
    if text_bias is not None and geometry.text:
        assert sums is not None
        out, sums = merge(out, sums, *attend_padding(call, chosen.name), text_bias)
    return out, sums


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device in the dtype that autocast has there; themselves where autocast is off."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple([x.to(dtype) for x in tensors])


def gradients_follow(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and True in [x.requires_grad for x in tensors]  # any() is a Python call for each


def attend_checked(
    chosen: Implementation, call: BlockSparseInputs, gradients: bool, opened: BlockLists | None = None
) -> tuple[Tensor, Tensor | None]:
    """`attend_blocks` without its checks; `opened` are the lists for a call outside the custom op.

    `gradients`: as of `gradients_follow`.

    The op serves autograd, tracing and profiles, which show its name, and hides modes such as a default device from
    the implementation. Where none is at work, the implementation is called by itself, which saves the host half of the
    time.
    """
    q, k, v = call[:3]
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        call = call._replace(q=contiguous_rows(q), k=contiguous_rows(k), v=contiguous_rows(v))
    if chosen.autograd:
        return chosen.load().forward(call)
    followed = torch.compiler.is_compiling() or gradients or traced() or _len_torch_function_stack()
    if followed or type(call.q) is not Tensor or torch.autograd.profiler._is_profiler_enabled:
        return attention_forward(*call.pack(), chosen.name)
    return chosen.load().forward(call if opened is None else call._replace(lists=opened))


def attend_visual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    query_order: TokenOrder,
    key_order: TokenOrder,
    *,
    text_lens: Tensor | None = None,
    text_bias: Tensor | None = None,
    scale: float | None = None,
    lse: bool = False,
    impl: Impl = AUTO,
) -> tuple[Tensor, Tensor | None]:
    """The visual queries of a sequence over listed visual blocks and over all conditioning and text keys.

    Args:
        q, k, v: the whole sequence, [B, H, N, D].
        lists: visual key blocks of each visual query block, [B, H, query blocks, width], without tables.
        query_order, key_order: blocks of both sides, on one grid.
        text_lens: int [B], valid text keys of each sample; None: all.
        text_bias: [B, N], see `attend_blocks`.

    Returns:
        Output [B, H, visual, D], in memory [B, visual, H, D], and LSE [B, H, visual], which may be None without `lse`.
    """
    queries, lists, geometry, segments = visual_call(q, lists, query_order, key_order, text_lens)
    bias = None if text_bias is None else text_bias[:, key_order.grid.visual_rows]
    return attend_blocks(queries, k, v, lists, geometry, segments, text_bias=bias, scale=scale, lse=lse, impl=impl)


def visual_call(
    q: Tensor, lists: BlockLists, query_order: TokenOrder, key_order: TokenOrder, text_lens: Tensor | None
) -> tuple[Tensor, BlockLists, Geometry, Segments]:
    """The queries, lists, geometry and segments with which `attend_visual` calls `attend_blocks`."""
    dense = key_order.dense_blocks
    if dense:
        around = torch.arange(key_order.visual_blocks, key_order.blocks, dtype=torch.int32, device=q.device)
        slots = lists.counts[..., None] + torch.arange(dense, device=q.device)
        indices = torch.nn.functional.pad(lists.indices, (0, dense))
        indices = indices.scatter(-1, slots.long(), around.expand(slots.shape))
        lists = BlockLists(indices, lists.counts + dense)
    geometry = dataclasses.replace(Geometry.of(query_order, key_order), own_queries=True)
    return visual_of(q, key_order.grid), lists, geometry, Segments.of(q, text_lens)


def pack(lists: BlockLists, geometry: Geometry, packing: str) -> Tensor:
    """Prepare lists without head axis once, rather than in each call: `BlockLists.packed`, int32 [words].

    Waits for the device.

    Args:
        packing: `impls.Implementation.packing` of the implementation.

    Raises:
        DitAccelError: the lists have a head axis or a wrong shape, or `geometry.partial_blocks` is too small.
    """
    want = geometry.query_order.blocks
    if lists.indices.ndim != 2 or len(lists.indices) != want:
        raise DitAccelError(f"Only lists [{want}, width] can be packed, got {list(lists.indices.shape)}.")
    return importlib.import_module(packing).pack(lists, geometry)


def opened(lists: BlockLists, geometry: Geometry, packing: str | None) -> BlockLists:
    """Lists whose packed tensor is taken apart once, where the implementation can; for calls outside the custom op."""
    take_apart = None if packing is None else getattr(importlib.import_module(packing), "opened", None)
    return lists if take_apart is None else take_apart(lists, geometry)


def attend_padding(call: BlockSparseInputs, impl: Impl) -> tuple[Tensor, Tensor]:
    """All queries over the text behind `text_len`: output [B, H, Nq, D] and LSE [B, H, Nq]."""
    q, k, v, _, segments, geometry, scale = call
    text_start, text_len = segments.text_start, segments.text_len
    assert text_len is not None
    if text_start is None:
        text_start = torch.full_like(text_len, geometry.usual[2])
    keys, values = (_text_from_its_end(x, text_start, geometry.text) for x in (k, v))
    rows, blocks = (-(-n // block) for n, block in ((q.shape[2], geometry.block_q), (geometry.text, geometry.block_k)))
    # Block 0 holds the row in front.
    indices = torch.arange(1, 1 + blocks, dtype=torch.int32, device=q.device).repeat(rows, 1)
    alone = Geometry(
        (1, 1, 1), (1, 1, q.shape[2]), geometry.block_q, geometry.block_k, None, None, 0, geometry.text,
        own_queries=True,
    )  # fmt: skip
    lists = BlockLists(indices, indices.new_full((rows,), blocks))
    out, lse = attend_blocks(
        q, keys, values, lists, alone, Segments(text_len=geometry.text - text_len), scale=scale, lse=True, impl=impl
    )
    assert lse is not None
    return out, lse


def check_bias(call: BlockSparseInputs, text_bias: Tensor | None) -> None:
    if text_bias is None:
        return
    want, text_len = (call.q.shape[0], call.q.shape[2]), call.segments.text_len
    if text_len is None or tuple(text_bias.shape) != want or not text_bias.is_floating_point():
        raise DitAccelError(
            f"text_bias must be floating point {list(want)}, one for each query, and come with text_len; got "
            f"{text_bias.dtype} {tuple(text_bias.shape)}{'' if text_len is not None else ' without text_len'}."
        )


def _text_from_its_end(x: Tensor, text_start: Tensor, text: int) -> Tensor:
    """The text rows of keys or values, the last one first, so that padding is in front.

    Args:
        x: [B, H, N, D].
        text_start: int32 [B], first text row of each sample.
        text: text rows.

    Returns:
        [B, H, 1 + text, D]; the row in front is one that no list names, since the engine's grids are not empty.
    """
    rows = torch.arange(text, -1, -1, device=x.device).clamp(max=text - 1) + text_start[:, None]
    return x.take_along_dim(rows[:, None, :, None], 2)


def merge(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One softmax over two sets of keys, from outputs [B, H, N, D] and LSE [B, H, N] over each.

    Args:
        bias: [B, N], added to a query's logits of the second set.
    """
    biased = other_lse if bias is None else other_lse + bias[:, None].to(lse.dtype)
    empty = other_lse == -torch.inf  # the first set may be empty too
    share = (biased - lse).masked_fill(empty, -torch.inf).sigmoid()[..., None]
    merged = torch.lerp(out.to(lse.dtype), other.to(lse.dtype), share).to(out.dtype)
    return merged, torch.where(empty, lse, torch.logaddexp(lse, biased.masked_fill(empty, 0.0)))


def check_call(call: BlockSparseInputs) -> None:
    """Refuse wrong shapes, dtypes and devices, without waiting for the device."""
    _check_geometry(call.geometry)
    check_tensors(call)
    _check_lists(call.q, call.lists, call.geometry)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(call: BlockSparseInputs) -> None:
    """The part of `check_call` that a plan's own lists and geometry leave."""
    q, k, v, _, segments, geometry, _ = call
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise DitAccelError(
            "Attention needs q [B, H, Nq, D] and k, v [B, H, Nk, D] with the same B, H and D, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    check_kinds(q, k, v)
    starts = [start is not None for start in segments[:3]]
    if any(starts) and not all(starts):
        raise DitAccelError("Give visual_start, conditioning_start and text_start together, or none of them.")
    for name, want, have in (
        ("q", geometry.query_order.grid.tokens, q.shape[2]),
        ("k and v", geometry.key_order.grid.tokens, k.shape[2]),
    ):
        if have < want or (have != want and not any(starts)):
            raise DitAccelError(
                f"grid {geometry.grid}, {geometry.conditioning} conditioning and {geometry.text} text tokens need "
                f"{name} with {want} rows, got {have}. To leave rows out, give the three starts."
            )
    for name, tensor in zip(segments._fields, segments, strict=True):
        if tensor is not None and (tensor.shape != q.shape[:1] or tensor.dtype != torch.int32):
            raise DitAccelError(
                f"{name} must be int32 [{q.shape[0]}], one per sample, got {tensor.dtype} {tuple(tensor.shape)}."
            )


def check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors of a dtype without attention, and tensors that differ in dtype or device."""
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise DitAccelError(
            "Attention needs q, k and v of one dtype among bfloat16, float16, float32 and float64, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}. Cast them first."
        )
    if not q.device == k.device == v.device:
        raise DitAccelError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}.")


def _check_geometry(geometry: Geometry) -> None:
    for name in ("grid", "query_grid"):
        if len(getattr(geometry, name)) != 3:
            raise DitAccelError(f"{name} needs (frames, rows, columns), got {getattr(geometry, name)}.")
    if geometry.partial_blocks is not None and geometry.partial_blocks < 0:
        raise DitAccelError(f"partial_blocks must be >= 0 or None, got {geometry.partial_blocks}.")


def _check_lists(q: Tensor, lists: BlockLists, geometry: Geometry) -> None:
    blocks, rows = geometry.query_order.blocks, tuple(lists.indices.shape[:-1])
    if rows not in ((blocks,), (q.shape[0], q.shape[1], blocks)):
        raise DitAccelError(
            f"kv_indices must be [{blocks}, width] or [{q.shape[0]}, {q.shape[1]}, {blocks}, width] for {blocks} query "
            f"blocks of {geometry.block_q}, got {tuple(lists.indices.shape)}."
        )
    if tuple(lists.counts.shape) != rows:
        raise DitAccelError(f"kv_counts must be {list(rows)}, as kv_indices, got {tuple(lists.counts.shape)}.")
    if lists.indices.dtype != torch.int32 or lists.counts.dtype != torch.int32:
        raise DitAccelError(f"Block lists must be int32, got {lists.indices.dtype} and {lists.counts.dtype}.")
    partial, tables = lists.partial, lists.tables
    if partial is not None and (partial.shape != lists.indices.shape or partial.dtype != torch.bool):
        raise DitAccelError(
            f"partial must be bool {tuple(lists.indices.shape)}, got {partial.dtype} {tuple(partial.shape)}."
        )
    if partial is not None and tables is None:
        raise DitAccelError("partial marks blocks that the tables decide, but tables is None. Give both or neither.")
    if tables is not None and (tables.ndim != 1 or tables.dtype != torch.int32):
        raise DitAccelError(f"tables must be int32 [words], got {tables.dtype} {tuple(tables.shape)}.")
    for name, tensor in zip(("kv_indices", "kv_counts", "partial", "tables"), lists[:4], strict=True):
        if tensor is not None and tensor.device != q.device:
            raise DitAccelError(f"{name} must be on {q.device} as q is, got {tensor.device}. Move the plan there.")


@torch.library.custom_op("dit_accel::block_sparse_attention", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    partial: Tensor | None,
    tables: Tensor | None,
    packed: Tensor | None,
    visual_start: Tensor | None,
    conditioning_start: Tensor | None,
    text_start: Tensor | None,
    text_len: Tensor | None,
    geometry: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE [B, H, Nq]."""
    records = indices, counts, partial, tables, packed, visual_start, conditioning_start, text_start, text_len
    return named(impl).load().forward(BlockSparseInputs.unpack((q, k, v, *records, geometry, scale)))


@attention_forward.register_fake
def _(q, k, v, *rest):
    return empty_rows(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("dit_accel::block_sparse_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tensors: Sequence[Tensor | None],
    geometry: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each laid out in memory as [B, N, H, D]; `tensors` are those of `attention_forward`."""
    call = BlockSparseInputs.unpack((*tensors, geometry, scale))
    return named(impl).load_gradients().backward(grad_out, grad_lse, out, lse, call)


@attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, tensors, *rest):
    return tuple(empty_rows(x) for x in tensors[:3])


register_gradients(attention_forward, attention_backward)
