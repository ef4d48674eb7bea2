"""Block-sparse attention with plain tensors and integers in place of records."""

from dit_accel.kernels.block_sparse.api import attend_blocks
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments


def block_sparse_attention(
    q,
    k,
    v,
    kv_indices,
    kv_counts,
    *,
    block_q,
    block_k,
    grid,
    partial=None,
    tables=None,
    partial_blocks=None,
    packed=None,
    tile_q=None,
    tile_k=None,
    conditioning=0,
    text=0,
    query_grid=None,
    visual_start=None,
    conditioning_start=None,
    text_start=None,
    text_len=None,
    return_lse=False,
    **options,
):
    """`attend_blocks`; with `return_lse` the LSE too. With `query_grid` the queries are visual tokens of that grid."""
    own_queries = query_grid is not None
    geometry = Geometry(
        grid, query_grid or grid, block_q, block_k, tile_q, tile_k, conditioning, text, own_queries, partial_blocks
    )
    lists = BlockLists(kv_indices, kv_counts, partial, tables, packed)
    segments = Segments(visual_start, conditioning_start, text_start, text_len)
    out, lse = attend_blocks(q, k, v, lists, geometry, segments, lse=return_lse, **options)
    return (out, lse) if return_lse else out
