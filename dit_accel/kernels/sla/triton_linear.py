"""The linear branch, as far as the forward and backward kernels share it: feature maps, and sums over key blocks.

The README of this folder has the equations; a head and its rows are those of `block_sparse.triton_tokens`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import LOG2E, load_rows, locate, rows_written, visual_slots
from dit_accel.kernels.records import HeadRows, SegmentRows
from dit_accel.kernels.sla.arguments import EPSILON

EPS = tl.constexpr(EPSILON)


class TokenLayout(NamedTuple):
    """Queries and keys, a `Side` each, and the `SegmentRows` of the keys, with lengths of text for each sample."""

    queries: Any
    keys: Any
    segments: Any


class StateTable(NamedTuple):
    """A state of the linear branch: table * peak, [B, H, D, D] and [B, H], and its sums fp32 [B, H, D]."""

    table: Any
    peaks: Any
    totals: Any


class Routes(NamedTuple):
    """Critical and negligible blocks of every query block, how many of each, and the number of visual key blocks."""

    critical: Any
    negligible: Any
    topk: Any
    skip: Any
    blocks: Any


class Selecting(NamedTuple):
    """The query blocks that select each key block, as in `triton_lists.Transposed`, and those that sum one by one.

    Attributes:
        entries, places, firsts: of critical blocks and those behind the visual ones.
        negligible_entries, negligible_firsts: of negligible blocks.
        modes: 1 for a query block that sums its marginal blocks one by one, int32 [B, H, query blocks].
        singles, n_singles: a list that starts with these query blocks, and how many there are.
    """

    entries: Any
    places: Any
    firsts: Any
    negligible_entries: Any
    negligible_firsts: Any
    modes: Any
    singles: Any
    n_singles: Any


@triton.jit
def from_row(x, row):
    """`HeadRows` from a later row on."""
    return HeadRows(x.start + row.to(tl.int64) * x.distance, x.distance)


@triton.jit
def stored_rows(x, rows, valid, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows that this program wrote to x by `store_rows`, fp32."""
    tl.debug_barrier()  # other threads load what a thread stored
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)
    return tl.load(rows_written(x, rows, heads, tokens, D, BLOCK_D), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(x, rows, valid, first, other, D: tl.constexpr, PART: tl.constexpr):
    """Columns `first` to `first + PART` of rows of one head, [ROWS, PART]; `other` in invalid rows and beyond D."""
    o_d = first + tl.arange(0, PART)
    mask = valid[:, None] & (o_d < D)
    return tl.load(x.start + rows.to(tl.int64)[:, None] * x.distance + o_d, mask=mask, other=other)


@triton.jit
def table_of(table, D: tl.constexpr):
    """The table of this program's head, from tables [B, H, D, D]."""
    return table + tl.program_id(1).to(tl.int64) * (D * D)


@triton.jit
def load_part(table, first, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, TURNED: tl.constexpr):
    """Rows `first` to `first + PART` of a table [D, D], or of its transpose if TURNED: [PART, BLOCK_D], 0 beyond D."""
    row = first + tl.arange(0, PART)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    place = column * D + row if TURNED else row * D + column
    return tl.load(table + place, mask=(row < D) & (column < D), other=0.0)


@triton.jit
def halves(x):
    """The left and right half of the columns."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))


@triton.jit
def times_table(x, table, acc, D: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr):
    """acc + x T [ROWS, BLOCK_D] for a table T [D, D]; acc + x T^T if TURNED.

    The product is made in two halves: with `mma.sync` a warp holds the table's part in registers.
    """
    HALF: tl.constexpr = BLOCK_D // 2
    if HALF < 16:
        acc = tl.dot(x, load_part(table, 0, D, BLOCK_D, BLOCK_D, TURNED), acc, input_precision="ieee")
    else:
        left, right = halves(x)
        acc = tl.dot(left, load_part(table, 0, D, BLOCK_D, HALF, TURNED), acc, input_precision="ieee")
        acc = tl.dot(right, load_part(table, HALF, D, BLOCK_D, HALF, TURNED), acc, input_precision="ieee")
    return acc


@triton.jit
def load_total(totals, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's head of totals [B, H, D] as [BLOCK_D], 0 beyond D."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(totals + tl.program_id(1).to(tl.int64) * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def store_sums(tables, totals, table, total, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the sums over this program's split, to fp32 [B, H, splits, D, D] and [B, H, splits, D]."""
    o_d = tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_table = tables + place * (D * D) + o_d[:, None] * D + o_d[None, :]
    tl.store(p_table, table, mask=(o_d < D)[:, None] & (o_d < D)[None, :])
    tl.store(totals + place * D + o_d, total, mask=o_d < D)


@triton.jit
def hidden_zero(counts):
    """A zero that the compiler cannot see; counts: a pointer to a number that is not negative.

    Values computed from it are recomputed, which shortens their live range. Otherwise the kernels spill.
    """
    return tl.minimum(tl.load(counts, volatile=True), 0)


@triton.jit
def recomputed_queries(counts, queries, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A `hidden_zero`, and this program's head, its query block's rows and their validity, recomputed."""
    zero = hidden_zero(counts)
    rows, valid, _raster = visual_slots(tl.program_id(0) + zero, tl.arange(0, BLOCK), queries, BLOCK, TILE)
    return zero, tl.program_id(1) + zero, rows, valid


@triton.jit
def recomputed_keys(counts, layout, heads, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """This program's head and ROWS rows of its key block, recomputed; whether each is a token, and a valid key."""
    PARTS: tl.constexpr = BLOCK // ROWS
    visual_start, conditioning_start, text_start, text_lens = layout.segments
    text = layout.keys.text
    zero = hidden_zero(counts)
    program, i_bh = tl.program_id(0) + zero, tl.program_id(1) + zero
    slots = program % PARTS * ROWS + tl.arange(0, ROWS)
    segments = SegmentRows(visual_start, conditioning_start, text_start, text)
    rows, there, _raster = locate(program // PARTS, slots, segments, layout.keys, BLOCK, TILE)
    # text past its valid length is no key
    padding = (rows >= text_start + tl.load(text_lens + i_bh // heads)) & (rows < text_start + text)
    return i_bh, rows, there, there & (padding == 0)


@triton.jit
def scales_of_rows(
    x, rows, valid, width, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """Statistics of whole rows that `mapped_columns` needs: the row's shift and size, fp32 [ROWS] each."""
    shift = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    size = tl.zeros([ROWS], dtype=tl.float32)
    if MAP == "softmax":
        for first in tl.range(0, width, COLUMNS, num_stages=1):
            part = load_columns(x, rows, valid, first, float("-inf"), D, COLUMNS).to(tl.float32)
            shift = tl.maximum(shift, tl.max(part, 1))
        shift = tl.where(valid, shift, 0.0)
        for first in tl.range(0, width, COLUMNS, num_stages=1):
            part = load_columns(x, rows, valid, first, float("-inf"), D, COLUMNS).to(tl.float32)
            size += tl.sum(tl.exp2(part * LOG2E - (shift * LOG2E)[:, None]), 1)
    return shift, tl.where(valid, size, 1.0)


@triton.jit
def mapped_columns(x, shift, size, inside, MAP: tl.constexpr):
    """phi of some columns of rows, fp32; 0 where not `inside`."""
    x = x.to(tl.float32)
    if MAP == "softmax":
        x = tl.where(inside, x, float("-inf"))
        x = tl.exp2(x * LOG2E - (shift * LOG2E)[:, None]) * (1.0 / size)[:, None]
    elif MAP == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        x = tl.where(inside, x, 0.0)
    else:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def mapped(x, D: tl.constexpr, MAP: tl.constexpr):
    """phi of rows [ROWS, BLOCK_D], fp32; 0 in columns beyond D."""
    x = x.to(tl.float32)
    inside = tl.arange(0, x.shape[1])[None, :] < D
    shift = tl.max(tl.where(inside, x, float("-inf")), 1)
    size = shift  # read only with softmax
    if MAP == "softmax":
        size = tl.sum(tl.where(inside, tl.exp2(x * LOG2E - (shift * LOG2E)[:, None]), 0.0), 1)
    return mapped_columns(x, shift, size, inside, MAP)


@triton.jit
def pulled_columns(gradient, x, phi, of_row, MAP: tl.constexpr):
    """dL/dx of some columns from their dL/dphi; of_row: the sum of phi * dL/dphi over the whole row."""
    if MAP == "softmax":
        result = phi * (gradient - of_row[:, None])
    elif MAP == "elu":
        result = gradient * tl.minimum(phi, 1.0)
    else:
        result = tl.where(x > 0.0, gradient, 0.0)
    return result


@triton.jit
def pulled_back(gradient, x, phi, MAP: tl.constexpr):
    """dL/dx from dL/dphi, fp32 [ROWS, BLOCK_D]."""
    return pulled_columns(gradient, x, phi, tl.sum(phi * gradient, 1), MAP)


@triton.jit
def add_features(
    acc, side_sum, x, k, v, block, first, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Add the terms of STEP slots of a key block to the sums of a query block; b = phi(k).

    Forward, x = phi(q): adds (x b^T) v to acc, and the row sums of x b^T to `side_sum` [BLOCK]. Backward, x = g: adds
    (x v^T) b to acc, and the sum of b over the slots to `side_sum` [BLOCK_D].
    """
    rows, valid, _raster = visual_slots(block, first + tl.arange(0, STEP), keys, BLOCK, TILE)
    b_v = load_rows(v, rows, valid, D, BLOCK_D)
    phi_k = tl.where(valid[:, None], mapped(load_rows(k, rows, valid, D, BLOCK_D), D, MAP), 0.0).to(b_v.dtype)
    if BACKWARD:
        products = tl.dot(x, tl.trans(b_v), input_precision="ieee").to(b_v.dtype)
        acc = tl.dot(products, phi_k, acc, input_precision="ieee")
        side_sum += tl.sum(phi_k.to(tl.float32), 0)
    else:
        products = tl.dot(x, tl.trans(phi_k), input_precision="ieee").to(b_v.dtype)
        acc = tl.dot(products, b_v, acc, input_precision="ieee")
        side_sum += tl.sum(products.to(tl.float32), 1)
    return acc, side_sum


@triton.jit
def routes_of(routes, i_bh, i_q, rows):
    """The `Routes` of one of `rows` query blocks."""
    row = i_bh.to(tl.int64) * rows + i_q
    critical, negligible = routes.critical + row * routes.topk, routes.negligible + row * routes.skip
    return Routes(critical, negligible, routes.topk, routes.skip, routes.blocks)


@triton.jit
def over_blocks(
    acc, side_sum, x, k, v, routes, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, MARGINAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """`add_features` over a query block's critical and negligible blocks, or over the MARGINAL ones, in neither list.

    Both lists ascend, so the marginal blocks are found in one pass.
    """
    if MARGINAL:
        i_critical = 0
        i_negligible = 0
        for block in range(routes.blocks):
            next_critical = tl.load(routes.critical + i_critical, mask=i_critical < routes.topk, other=-1)
            next_negligible = tl.load(routes.negligible + i_negligible, mask=i_negligible < routes.skip, other=-1)
            if next_critical == block:
                i_critical += 1
            elif next_negligible == block:
                i_negligible += 1
            else:
                for first in range(0, BLOCK, STEP):
                    acc, side_sum = add_features(
                        acc, side_sum, x, k, v, block, first, keys, D, BLOCK_D, BLOCK, TILE, STEP, MAP, BACKWARD
                    )  # fmt: skip
    else:
        STEPS: tl.constexpr = BLOCK // STEP
        for i in range((routes.topk + routes.skip) * STEPS):
            place = i // STEPS
            is_critical = place < routes.topk
            block = tl.load(tl.where(is_critical, routes.critical + place, routes.negligible + (place - routes.topk)))
            acc, side_sum = add_features(
                acc, side_sum, x, k, v, block, i % STEPS * STEP, keys, D, BLOCK_D, BLOCK, TILE, STEP, MAP, BACKWARD
            )  # fmt: skip
    return acc, side_sum


@triton.jit
def add_queries(
    sums, phi_k, b_v, sign, read, block, first, queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """Add STEP slots of a query block, times sign, to the sums of (b a^T / d) g, (v g^T / d) a and -a r / d.

    `read`: q and g as `HeadRows`, d and r of the head.
    """
    of_v, of_k, weights = sums
    q, grad_out, denominators, ratios = read
    rows, valid, _raster = visual_slots(block, first + tl.arange(0, STEP), queries, BLOCK, TILE)
    b_q = load_rows(q, rows, valid, D, BLOCK_D)
    b_g = load_rows(grad_out, rows, valid, D, BLOCK_D).to(b_q.dtype)
    denominator = tl.load(denominators + rows, mask=valid, other=1.0)
    ratio = tl.load(ratios + rows, mask=valid, other=0.0)
    # each factor of a product gets sqrt(1 / d), so that neither leaves the range of half precision
    share = 1.0 / tl.sqrt(denominator)
    scaled = (tl.where(valid[:, None], mapped(b_q, D, MAP), 0.0) * share[:, None]).to(b_q.dtype)
    share = share * sign
    products = tl.dot(phi_k, tl.trans(scaled), input_precision="ieee") * share[None, :]
    of_v = tl.dot(products.to(b_g.dtype), b_g, of_v, input_precision="ieee")
    products = tl.dot(b_v, tl.trans(b_g), input_precision="ieee") * share[None, :]
    of_k = tl.dot(products.to(scaled.dtype), scaled, of_k, input_precision="ieee")
    weights -= tl.sum(scaled.to(tl.float32) * (ratio * share)[:, None], 0)
    return of_v, of_k, weights


@triton.jit
def holds_block(entries, n, block):
    """1 if a list holds the block, else 0."""
    held = 0
    for first in range(0, n, 64):
        place = first + tl.arange(0, 64)
        entry = tl.load(entries + place, mask=place < n, other=-1)
        held = tl.maximum(held, tl.max((entry == block).to(tl.int32), 0))
    return held


@triton.jit
def over_selecting(
    sums, phi_k, b_v, i_k, read, routes, selecting, layout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """`add_queries` for a visual key block i_k.

    Subtracts the query blocks whose totals hold i_k although it is critical or negligible for them. Adds the query
    blocks that sum their marginal blocks one by one and have i_k among them.

    Args:
        routes, selecting: of all heads.
        BLOCK, TILE: of query blocks.
    """
    STEPS: tl.constexpr = BLOCK // STEP
    queries = layout.queries
    i_bh = tl.program_id(1)
    first_list = i_bh.to(tl.int64) * queries.blocks
    for BY in tl.static_range(2):  # query blocks for which this key block is critical, then negligible
        entries = selecting.negligible_entries if BY else selecting.entries
        p_first = selecting.negligible_firsts if BY else selecting.firsts
        p_first += i_bh.to(tl.int64) * (2 * (routes.blocks if BY else layout.keys.blocks) + 1) + 2 * i_k
        part = tl.load(p_first)  # as in `over_query_lists`
        for i in range((tl.load(p_first + 2) - part) * STEPS):
            block = tl.load(entries + part + i // STEPS)
            if tl.load(selecting.modes + first_list + block) == 0:
                sums = add_queries(
                    sums, phi_k, b_v, -1.0, read, block, i % STEPS * STEP, queries, D, BLOCK_D, BLOCK, TILE, STEP, MAP
                )  # fmt: skip
    for i in range(tl.load(selecting.n_singles + i_bh)):
        block = tl.load(selecting.singles + first_list + i)
        lists = routes_of(routes, i_bh, block, queries.blocks)
        if holds_block(lists.critical, lists.topk, i_k) + holds_block(lists.negligible, lists.skip, i_k) == 0:
            for first in range(0, BLOCK, STEP):
                sums = add_queries(
                    sums, phi_k, b_v, 1.0, read, block, first, queries, D, BLOCK_D, BLOCK, TILE, STEP, MAP
                )  # fmt: skip
    return sums
