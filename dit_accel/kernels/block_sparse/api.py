"""Block-sparse attention: the one door to the engine behind every static method and the critical part of SLA.

Plain tensors and integers come in; which implementation computes is a separate choice (`choose_impl`).
"""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import ops, padding, triton_lists
from dit_accel.kernels.block_sparse import reference as reference_impl
from dit_accel.kernels.block_sparse.geometry import Geometry, Shape, read_layouts
from dit_accel.kernels.block_sparse.triton_configs import unsupported

Impl = Literal["auto", "reference", "portable", "triton"]

_IMPLS = ("auto", "reference", "portable", "triton")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_counts: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    grid: Shape,
    partial: torch.Tensor | None = None,
    tables: torch.Tensor | None = None,
    partial_blocks: int | None = None,
    packed: torch.Tensor | None = None,
    tile_q: Shape | None = None,
    tile_k: Shape | None = None,
    conditioning: int = 0,
    text: int = 0,
    query_grid: Shape | None = None,
    visual_start: torch.Tensor | None = None,
    conditioning_start: torch.Tensor | None = None,
    text_start: torch.Tensor | None = None,
    text_len: torch.Tensor | None = None,
    text_bias: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which each block of queries visits only its listed blocks of keys.

    Blocks are those of `order.TokenOrder`: visual blocks first (raster runs, or 3-D tiles), then conditioning blocks,
    then text blocks, each segment padded to whole blocks by itself. Padding slots are never attended.

    Args:
        q: queries [B, H, Nq, D], any strides; bfloat16, float16, float32 or float64.
        k, v: keys and values [B, H, Nk, D], any strides; dtype and device as q.
        kv_indices: int32 [q_blocks, width], or [B, H, q_blocks, width] for lists per head: the key blocks that a
            query block visits, each at most once; entries behind its count are not read.
        kv_counts: int32, shape of `kv_indices` without the last: how many entries count.
        block_q, block_k: tokens in a block.
        grid: frames, rows and columns of the visual tokens.
        partial: bool, shape of `kv_indices`: the listed blocks in which `tables` decides pair by pair; the other
            blocks are attended whole. None with `tables`: all of them. Needs `tables`.
        tables: int32 [words], the packed predicate over visual pairs (`masks.Mask.pack`); pairs with a text or
            conditioning token are always allowed. None: every listed block is attended whole.
        partial_blocks: how many entries `tables` decide, if known (or a number above); `triton` then makes room for the
            bit masks of as many blocks, 1 KB a block of 128x64. None: for all entries of visual blocks.
        packed: what `pack` made of these very lists, for `triton` to read in place of them; the others need it not.
        tile_q, tile_k: 3-D tile of a visual block; its product is the block. None: raster order.
        conditioning, text: conditioning and text tokens, padding included.
        query_grid: the queries are visual tokens alone, in a grid of this size, from row 0 of `q` (Nq and Nk may then
            differ; the tables' query axes are this grid's). None: queries and keys are the same tokens.
        visual_start, conditioning_start, text_start: int32 [B], first row of each segment per sample. None for all
            three means ``[visual | conditioning | text]``. Rows in no segment are never read; their output is 0.
        text_len: int32 [B], valid text keys per sample, from `text_start` on; None: all of them. The remaining text
            rows are queries, and never keys but with `text_bias`.
        text_bias: floating point [B, Nq], what each query adds to the scaled logits of those remaining text rows, which
            are keys of every query then. Needs `text_len`.
        scale: factor on the logits; None: D ** -0.5.
        return_lse: also return the natural logarithm of each row's sum of exponentials. Its gradient flows.
        impl: "auto" (see `choose_impl`), or one of "reference", "portable" and "triton", which run or raise.

    Returns:
        The output [B, H, Nq, D] in q's dtype, whose memory is [B, Nq, H, D] contiguous; with `return_lse` also the
        LSE [B, H, Nq], float32 (float64 for float64 inputs). A query that sees no key has output 0 and LSE -inf.

    Raises:
        DitAccelError: an argument has the wrong shape, dtype or device, or `impl` cannot run here.

    Source:
        Online softmax with a log-sum-exp per row: Dao et al., FlashAttention (arXiv:2205.14135), Algorithms 1 and 4;
        the gradient of the LSE adds its incoming gradient to dP before delta is subtracted.

    Example:
        >>> q = torch.randn(1, 2, 256, 64)
        >>> lists = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]], dtype=torch.int32)
        >>> counts = torch.full((4,), 2, dtype=torch.int32)
        >>> block_sparse_attention(q, q, q, lists, counts, block_q=64, block_k=64, grid=(1, 1, 256)).shape
        torch.Size([1, 2, 256, 64])
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_tensors(q, k, v)
    geometry = _geometry(grid, query_grid, block_q, block_k, tile_q, tile_k, conditioning, text, partial_blocks)
    starts = (visual_start, conditioning_start, text_start)
    _check_geometry(q, k, geometry, starts, text_len)
    _check_bias(q, text_len, text_bias)
    _check_lists(q, kv_indices, kv_counts, partial, tables, geometry)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    name, _ = choose_impl(q.device.type, impl, unsupported(q.dtype, q.shape[-1], block_q, block_k))
    if name == "reference":
        out, lse = _reference(q, k, v, kv_indices, kv_counts, partial, tables, (*starts, text_len), geometry, scale)
    else:
        out, lse = ops.attention_forward(
            q, k, v, kv_indices, kv_counts, partial, tables, *starts, text_len,
            packed if name == "triton" else None, geometry.pack(), scale, name,
        )  # fmt: skip
    if text_bias is not None and text:
        behind, behind_lse = _attend_padding(q, k, v, geometry, text_start, text_len, scale, impl)
        out, lse = padding.merge(out, lse, behind, behind_lse, text_bias)
    return (out, lse) if return_lse else out


def pack(
    kv_indices: torch.Tensor,
    kv_counts: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    grid: Shape,
    partial: torch.Tensor | None = None,
    tables: torch.Tensor | None = None,
    partial_blocks: int | None = None,
    tile_q: Shape | None = None,
    tile_k: Shape | None = None,
    conditioning: int = 0,
    text: int = 0,
) -> torch.Tensor:
    """What the Triton implementation makes of lists in each call and its backward, made once: for lists that stay.

    It is some twenty launches and a sort, and needs no Triton. Waits for the device.

    Args:
        kv_indices, kv_counts: without a head axis; all arguments as in `block_sparse_attention`.

    Returns:
        int32 [words] on the device of the lists, to be passed as `packed` beside the same arguments.

    Raises:
        DitAccelError: the lists have a head axis or a wrong shape, or `partial_blocks` is too small.
    """
    geometry = _geometry(grid, None, block_q, block_k, tile_q, tile_k, conditioning, text, partial_blocks)
    want = geometry.query_order.blocks
    if kv_indices.ndim != 2 or len(kv_indices) != want:
        raise DitAccelError(f"Only lists [{want}, width] can be packed, got {list(kv_indices.shape)}.")
    lists, transposed = triton_lists.pack(kv_indices, kv_counts, partial, tables, geometry)
    if partial_blocks is not None and tables is not None and int(lists.partial_blocks()) > partial_blocks:
        raise DitAccelError(f"{int(lists.partial_blocks())} blocks are partial, more than {partial_blocks=}.")
    return triton_lists.join(lists, transposed)


def _geometry(
    grid: Shape,
    query_grid: Shape | None,
    block_q: int,
    block_k: int,
    tile_q: Shape | None,
    tile_k: Shape | None,
    conditioning: int,
    text: int,
    partial_blocks: int | None,
) -> Geometry:
    return Geometry(
        grid=_sizes(grid, "grid"),
        query_grid=_sizes(grid if query_grid is None else query_grid, "query_grid"),
        block_q=block_q,
        block_k=block_k,
        tile_q=_tile(tile_q, block_q, "tile_q"),
        tile_k=_tile(tile_k, block_k, "tile_k"),
        conditioning=conditioning,
        text=text,
        own_queries=query_grid is not None,
        partial_blocks=partial_blocks,
    )


def _attend_padding(q, k, v, geometry, text_start, text_len, scale, impl):
    """All queries over the text behind `text_len`: output [B, H, Nq, D] and LSE [B, H, Nq]."""
    if text_start is None:
        text_start = torch.full_like(text_len, geometry.key_order.grid.visual + geometry.conditioning)
    keys, values = (padding.from_its_end(x, text_start, geometry.text) for x in (k, v))
    rows, blocks = (-(-n // block) for n, block in ((q.shape[2], geometry.block_q), (geometry.text, geometry.block_k)))
    # Block 0 holds the row in front.
    lists = torch.arange(1, 1 + blocks, dtype=torch.int32, device=q.device).repeat(rows, 1)
    return block_sparse_attention(
        q,
        keys,
        values,
        lists,
        lists.new_full((rows,), blocks),
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        grid=(1, 1, 1),
        query_grid=(1, 1, q.shape[2]),
        text=geometry.text,
        text_len=geometry.text - text_len,
        scale=scale,
        return_lse=True,
        impl=impl,
    )


def choose_impl(device_type: str, impl: Impl = "auto", obstacle: str | None = None) -> tuple[str, str]:
    """The implementation that a call on this kind of device gets, and why.

    Every implementation computes the same masked result, so "auto" looks only for speed: Triton on CUDA, the portable
    one elsewhere. A named implementation is never replaced by another.

    Args:
        device_type: "cpu", "cuda", ...
        impl: "auto" or a name.
        obstacle: why the Triton kernels cannot compute the call at hand (`triton_configs.unsupported`), or None.

    Returns:
        The name and the reason, a sentence fit for a report.

    Raises:
        DitAccelError: the name is unknown, or "triton" is asked for and is not installed or cannot compute the call.
    """
    if impl not in _IMPLS:
        raise DitAccelError(f"impl must be one of {', '.join(_IMPLS)}, got {impl!r}.")
    if impl == "triton" and not _HAS_TRITON:
        raise DitAccelError(
            "impl='triton' needs the package triton, which is not installed: pip install triton, or use impl='auto'."
        )
    if impl == "triton" and obstacle is not None:
        raise DitAccelError(f"impl='triton' cannot compute this: {obstacle}. Use impl='portable' or 'auto'.")
    if impl != "auto":
        return impl, f"impl={impl!r} was asked for"
    if device_type != "cuda":
        return "portable", f"the device is {device_type}"
    if not _HAS_TRITON:
        return "portable", "Triton is not installed"
    if obstacle is not None:
        return "portable", obstacle
    return "triton", "Triton is the fastest on CUDA"


def _reference(q, k, v, kv_indices, kv_counts, partial, tables, starts, geometry, scale):
    layouts = read_layouts(geometry, len(q), k.shape[2], *starts)
    out, lse = reference_impl.forward(q, k, v, kv_indices, kv_counts, partial, tables, geometry, layouts, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _sizes(sizes: Shape, name: str) -> Shape:
    if len(sizes) != 3 or any(size < 1 for size in sizes):
        raise DitAccelError(f"{name} needs (frames, rows, columns), each at least 1, got {tuple(sizes)}.")
    frames, rows, columns = sizes
    return frames, rows, columns


def _tile(tile: Shape | None, block: int, name: str) -> Shape | None:
    if block < 1:
        raise DitAccelError(f"Blocks hold at least one token, got {block}.")
    if tile is None:
        return None
    tile = _sizes(tile, name)
    if math.prod(tile) != block:
        raise DitAccelError(f"{name}={tile} holds {math.prod(tile)} tokens but the block is {block}; they must agree.")
    return tile


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise DitAccelError(
            "Attention needs q [B, H, Nq, D] and k, v [B, H, Nk, D] with the same B, H and D, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise DitAccelError(
            "Attention needs q, k and v of one dtype among bfloat16, float16, float32 and float64, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}; cast them first."
        )
    if not q.device == k.device == v.device:
        raise DitAccelError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}.")


def _check_geometry(
    q: torch.Tensor,
    k: torch.Tensor,
    geometry: Geometry,
    starts: tuple[torch.Tensor | None, ...],
    text_len: torch.Tensor | None,
) -> None:
    if geometry.conditioning < 0 or geometry.text < 0:
        raise DitAccelError(f"conditioning and text must be >= 0, got {geometry.conditioning} and {geometry.text}.")
    if geometry.partial_blocks is not None and geometry.partial_blocks < 0:
        raise DitAccelError(f"partial_blocks must be >= 0 or None, got {geometry.partial_blocks}.")
    given = [start is not None for start in starts]
    if any(given) and not all(given):
        raise DitAccelError("Give visual_start, conditioning_start and text_start together, or none of them.")
    for name, want, have in (
        ("q", geometry.query_order.grid.tokens, q.shape[2]),
        ("k and v", geometry.key_order.grid.tokens, k.shape[2]),
    ):
        if have < want or (have != want and not any(given)):
            raise DitAccelError(
                f"grid {geometry.grid}, {geometry.conditioning} conditioning and {geometry.text} text tokens need "
                f"{name} with {want} rows, got {have}; rows to be left out need the three starts."
            )
    for name, tensor in zip(
        ("visual_start", "conditioning_start", "text_start", "text_len"), (*starts, text_len), strict=True
    ):
        if tensor is not None and (tensor.shape != q.shape[:1] or tensor.dtype != torch.int32):
            raise DitAccelError(
                f"{name} must be int32 [{q.shape[0]}], one per sample, got {tensor.dtype} {tuple(tensor.shape)}."
            )


def _check_bias(q: torch.Tensor, text_len: torch.Tensor | None, text_bias: torch.Tensor | None) -> None:
    if text_bias is None:
        return
    want = q.shape[0], q.shape[2]
    if text_len is None or tuple(text_bias.shape) != want or not text_bias.is_floating_point():
        raise DitAccelError(
            f"text_bias must be floating point {list(want)}, one for each query, and come with text_len; got "
            f"{text_bias.dtype} {tuple(text_bias.shape)}{'' if text_len is not None else ' without text_len'}."
        )


def _check_lists(
    q: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_counts: torch.Tensor,
    partial: torch.Tensor | None,
    tables: torch.Tensor | None,
    geometry: Geometry,
) -> None:
    blocks = geometry.query_order.blocks
    rows = tuple(kv_indices.shape[:-1])
    if rows not in ((blocks,), (q.shape[0], q.shape[1], blocks)):
        raise DitAccelError(
            f"kv_indices must be [{blocks}, width] or [{q.shape[0]}, {q.shape[1]}, {blocks}, width] for {blocks} query "
            f"blocks of {geometry.block_q}, got {tuple(kv_indices.shape)}."
        )
    if tuple(kv_counts.shape) != rows:
        raise DitAccelError(f"kv_counts must be {list(rows)}, as kv_indices, got {tuple(kv_counts.shape)}.")
    if kv_indices.dtype != torch.int32 or kv_counts.dtype != torch.int32:
        raise DitAccelError(f"Block lists must be int32, got {kv_indices.dtype} and {kv_counts.dtype}.")
    if partial is not None and (partial.shape != kv_indices.shape or partial.dtype != torch.bool):
        raise DitAccelError(
            f"partial must be bool {tuple(kv_indices.shape)}, got {partial.dtype} {tuple(partial.shape)}."
        )
    if partial is not None and tables is None:
        raise DitAccelError("partial marks blocks that the tables decide, but tables is None; give both or neither.")
    if tables is not None and (tables.ndim != 1 or tables.dtype != torch.int32):
        raise DitAccelError(f"tables must be int32 [words], got {tables.dtype} {tuple(tables.shape)}.")
    for name, tensor in (
        ("kv_indices", kv_indices),
        ("kv_counts", kv_counts),
        ("partial", partial),
        ("tables", tables),
    ):
        if tensor is not None and tensor.device != q.device:
            raise DitAccelError(f"{name} must be on {q.device} as q is, got {tensor.device}; move the plan there.")
