"""Generalized neighborhood attention: hand vectors, NATTEN's lists, published block counts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.methods.gna import axis_table
from dit_accel.tokens import TokenGrid

IN_MODELS = {"window": (3, 3, 3)}


def keys_seen(length, window, stride=1, dilation=1, causal=False):
    """Keys of each query, by the definition's own words and one query at a time."""
    rows = []
    for position in range(length):
        residue, query = position % dilation, position // dilation
        group = [x for x in range(length) if x % dilation == residue]
        if causal:
            leader = min(query // stride * stride + stride - 1, len(group) - 1)
            rows.append([group[j] for j in range(max(leader - window + 1, 0), query + 1)])
        else:
            leader = min(query // stride * stride + stride // 2, len(group) - 1)
            start = min(max(leader - window // 2, 0), len(group) - window)
            rows.append(group[start : start + window])
    return rows


def seen_by(table):
    return [list(range(int(a), int(b), table.step)) for a, b in zip(table.start, table.stop, strict=True)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((10, 4), "03 03 03 14 25 36 47 58 69 69"),
        ((10, 5), "04 04 04 15 26 37 48 59 59 59"),
        ((10, 4, 2), "03 03 14 14 36 36 58 58 69 69"),
        ((10, 4, 4), "03 03 03 03 47 47 47 47 69 69"),
        ((10, 4, 3), "03 03 03 25 25 25 58 58 58 69"),
        ((10, 4, 2, 1, True), "00 01 02 03 24 25 46 47 68 69"),
    ],
)
def test_hand_vectors(arguments, expected):
    table = axis_table(*arguments)
    assert [f"{keys[0]}{keys[-1]}" for keys in seen_by(table)] == expected.split()


def test_hand_vectors_with_two_digits_and_dilation():
    ends = [(keys[0], keys[-1]) for keys in seen_by(axis_table(12, 6, 4))]
    assert ends == [(0, 5)] * 4 + [(3, 8)] * 4 + [(6, 11)] * 4
    ends = [(keys[0], keys[-1]) for keys in seen_by(axis_table(30, 18, 16))]
    assert ends == [(0, 17)] * 16 + [(12, 29)] * 14
    dilated = seen_by(axis_table(10, 3, 2, 2))
    assert dilated[:6] == [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [4, 6, 8], [5, 7, 9]]
    assert seen_by(axis_table(11, 3, 1, 2))[-2:] == [[5, 7, 9], [6, 8, 10]]


@settings(max_examples=100)
@given(st.data())
def test_axis_tables_follow_the_definition(data):
    length = data.draw(st.integers(1, 40))
    dilation = data.draw(st.integers(1, length))
    window = data.draw(st.integers(1, length // dilation))
    stride = data.draw(st.integers(1, window))
    causal = data.draw(st.booleans())
    table = axis_table(length, window, stride, dilation, causal)
    assert seen_by(table) == keys_seen(length, window, stride, dilation, causal)


NATTEN = {
    "1-D": (
        497_606_868,
        "256 255 82 1; 128 63 31 1; 2048 2048 1 1; 32768 2048 2048 1; 32768 2048 256 1; 32768 2048 128 1; "
        "32768 2048 1 1; 128 3 1 1; 128 3 2 5; 128 15 1 1; 128 3 2 10; 128 8 7 5; 128 61 33 1; 125 3 1 1; "
        "125 15 1 1; 256 3 2 10",
    ),
    "2-D": (
        67_519_093,
        "5x25 5x16 1x16 1x1; 84x19 7x3 1x1 5x1; 19x29 8x8 1x1 2x3; 48x17 24x16 1x1 2x1; 67x80 12x7 8x4 5x11; "
        "8x8 8x8 1x1 1x1; 33x33 24x16 1x1 1x1; 16x16 16x16 1x1 1x1; 44x80 44x80 1x1 1x1; 40x20 3x7 1x1 1x1; "
        "16x16 3x3 1x1 1x1; 44x80 9x10 1x1 1x1; 28x40 17x31 1x1 1x1; 36x40 36x40 12x13 1x1; 44x80 44x80 4x8 1x1",
    ),
    "3-D": (
        205_305_799,
        "32x10x10 7x3x3 5x1x1 1x2x3; 8x8x16 3x3x3 2x1x2 2x2x4; 18x37x12 14x16x12 12x8x1 1x2x1; "
        "13x11x9 3x4x3 2x3x3 3x2x2; 16x16x16 16x16x16 1x1x1 1x1x1; 8x4x8 7x3x7 1x1x1 1x1x1; "
        "16x16x16 16x16x16 2x4x5 1x1x1",
    ),
}


def rows_of(listing):
    rows = [row.split() for row in listing.split("; ")]
    return [[tuple(map(int, entry.split("x"))) for entry in row] for row in rows]


@pytest.mark.parametrize("kind", NATTEN)
def test_natten_parameter_lists(kind):
    """Pair counts of NATTEN's test lists under every causal combination, and brute force where it is small enough."""
    checksum, listing = NATTEN[kind]
    total = 0
    for shape, window, stride, dilation in rows_of(listing):
        for causal in itertools.product((False, True), repeat=len(shape)):
            lead = 3 - len(shape)
            plan = dit_accel.plan(
                "gna",
                TokenGrid(*(1,) * lead, *shape),
                window=(1,) * lead + window,
                stride=(1,) * lead + stride,
                dilation=(1,) * lead + dilation,
                causal=(False,) * lead + causal,
            )
            total += plan.pairs
            brute = [
                sum(map(len, keys_seen(*axis))) for axis in zip(shape, window, stride, dilation, causal, strict=True)
            ] if max(shape) <= 256 else None  # fmt: skip
            assert brute is None or plan.pairs == math.prod(brute)
            if plan.grid.tokens <= 1100:
                assert int(plan.token_mask().sum()) == plan.pairs
    assert total == checksum


FLUX4K, FLUX2K, FLUX1K = (1, 256, 256), (1, 128, 128), (1, 64, 64)
HUNYUAN, HUNYUAN720, WAN768 = (30, 48, 80), (33, 45, 80), (18, 48, 80)
WAN720, WAN480, COSMOS, COGVIDEOX = (21, 45, 80), (21, 30, 52), (16, 44, 80), (13, 30, 45)

RASTER = [  # grid, window, stride, causal, pairs, blocks visited at 64 x 64, 128 x 64, 128 x 128
    (FLUX4K, (1, 80, 80), 1, False, 419_430_400, 204800, 122880, 81920),
    (FLUX4K, (1, 80, 80), 16, False, 419_430_400, 204800, 122880, 81920),
    (FLUX4K, (1, 64, 64), 64, False, 268_435_456, 65536, 65536, 32768),
    (FLUX2K, (1, 40, 40), 1, False, 26_214_400, 20480, 10240, 5120),
    (FLUX2K, (1, 40, 40), 8, False, 26_214_400, 20480, 10240, 5120),
    (FLUX1K, (1, 24, 24), 1, False, 2_359_296, 1536, 788, 404),
    (FLUX1K, (1, 24, 24), 8, False, 2_359_296, 1536, 768, 384),
    (HUNYUAN, (18, 24, 24), 1, False, 1_194_393_600, 984960, 500580, 251100),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), False, 1_194_393_600, 972000, 486000, 243000),
    (HUNYUAN, (30, 40, 40), (1, 32, 8), False, 5_529_600_000, 2700000, 1350000, 675000),
    (COSMOS, (16, 32, 48), (1, 8, 16), False, 1_384_120_320, 563200, 285440, 146176),
    (COSMOS, (16, 24, 16), (1, 8, 16), False, 346_030_080, 422400, 217600, 112256),
    (WAN768, (18, 24, 24), (16, 8, 8), False, 716_636_160, 583200, 291600, 145800),
    (WAN720, (11, 23, 41), 1, False, 784_198_800, 390838, 201699, 103976),
    (WAN720, (21, 15, 16), 1, False, 381_024_000, 492067, 258458, 135424),
    (WAN480, (11, 15, 26), 1, False, 140_540_400, 77816, 41562, 22078),
    (WAN480, (11, 15, 26), 1, (True, False, False), 107_078_400, 59244, 31645, 16779),
    (HUNYUAN720, (17, 23, 41), 1, False, 1_904_482_800, 949255, 489890, 252692),
    (COGVIDEOX, (7, 15, 23), 1, False, 42_383_250, 23652, 12753, 6800),
]


@pytest.mark.parametrize(("shape", "window", "stride", "causal", "pairs", "b64", "b128", "b128x128"), RASTER)
def test_published_raster_counts(shape, window, stride, causal, pairs, b64, b128, b128x128):
    plan = dit_accel.plan("gna", TokenGrid(*shape), window=window, stride=stride, causal=causal)
    assert plan.pairs == pairs
    for sizes, visited in (((64, 64), b64), ((128, 64), b128), ((128, 128), b128x128)):
        assert plan.block_mask(*sizes, order="raster").visited == visited


PERFECT = "perfect"
TILED = [  # grid, window, stride, tile of queries, tile of keys, visited, total, full
    (FLUX4K, (1, 80, 80), 1, (1, 16, 8), (1, 16, 8), 34884, 262144, 17284),
    (FLUX4K, (1, 80, 80), 1, (1, 16, 16), (1, 16, 8), 18564, 131072, 8004),
    (FLUX4K, (1, 80, 80), 1, (1, 8, 8), (1, 8, 8), 116964, 1048576, 88804),
    (FLUX4K, (1, 80, 80), (1, 16, 1), (1, 16, 16), (1, 16, 8), 14560, 131072, 11040),
    (FLUX4K, (1, 80, 80), 16, (1, 16, 8), (1, 16, 8), 25600, 262144, PERFECT),
    (FLUX4K, (1, 80, 80), 16, (1, 16, 16), (1, 16, 8), 12800, 131072, PERFECT),
    (FLUX4K, (1, 80, 80), 16, (1, 8, 8), (1, 8, 8), 102400, 1048576, PERFECT),
    (FLUX2K, (1, 40, 40), 8, (1, 8, 8), (1, 8, 8), 6400, 65536, PERFECT),
    (FLUX2K, (1, 40, 40), 8, (1, 16, 8), (1, 16, 8), 1920, 16384, 800),
    (FLUX1K, (1, 24, 24), 8, (1, 8, 8), (1, 8, 8), 576, 4096, PERFECT),
    (HUNYUAN, (18, 24, 24), 1, (2, 8, 8), (2, 8, 8), 148896, 810000, 24768),
    (HUNYUAN, (18, 24, 24), 1, (4, 8, 8), (2, 8, 8), 82368, 432000, 12672),
    (HUNYUAN, (18, 24, 24), 1, (4, 4, 4), (4, 4, 4), 449436, 3686400, None),
    (HUNYUAN, (18, 24, 24), (2, 1, 1), (4, 8, 8), (2, 8, 8), 79200, 432000, None),
    (HUNYUAN, (18, 24, 24), (1, 1, 8), (4, 8, 8), (2, 8, 8), 56160, 432000, None),
    (HUNYUAN, (18, 24, 24), (2, 1, 8), (4, 8, 8), (2, 8, 8), 54000, 432000, None),
    (HUNYUAN, (18, 24, 24), (1, 8, 8), (4, 8, 8), (2, 8, 8), 42120, 432000, None),
    (HUNYUAN, (18, 24, 24), (2, 8, 8), (4, 8, 8), (2, 8, 8), 40500, 432000, None),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 72900, 810000, PERFECT),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 38880, 432000, PERFECT),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 4, 8), (2, 4, 8), 291600, 3240000, PERFECT),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (4, 4, 4), (4, 4, 4), 345600, 3686400, None),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (6, 8, 8), (6, 8, 8), 9180, 90000, None),
    (HUNYUAN, (18, 24, 24), (6, 8, 8), (6, 8, 8), (6, 8, 8), 8100, 90000, PERFECT),
    (COSMOS, (16, 32, 48), 1, (8, 4, 8), (4, 4, 8), 46592, 96800, None),
    (COSMOS, (16, 32, 48), (1, 8, 16), (8, 4, 8), (4, 4, 8), 42240, 96800, PERFECT),
    (COSMOS, (16, 24, 16), (1, 8, 16), (4, 4, 16), (2, 4, 16), 10560, 96800, PERFECT),
    (WAN720, (11, 23, 41), 1, (2, 8, 8), (2, 8, 8), 113600, 435600, None),
    (WAN720, (11, 23, 41), 1, (4, 4, 4), (4, 4, 4), 445500, 2073600, None),
    (WAN480, (11, 15, 26), 1, (2, 8, 8), (2, 8, 8), 24211, 94864, None),
    (WAN480, (11, 15, 26), 1, (4, 4, 4), (4, 4, 4), 92150, 389376, None),
    ((1, 1, 32768), (1, 1, 2048), 1, (1, 1, 128), (1, 1, 128), 4336, 65536, None),
    ((1, 1, 32768), (1, 1, 2048), 128, (1, 1, 128), (1, 1, 128), 4336, 65536, None),
    ((1, 1, 32768), (1, 1, 2048), 256, (1, 1, 128), (1, 1, 128), 4096, 65536, PERFECT),
    ((1, 1, 32768), (1, 1, 2048), 2048, (1, 1, 128), (1, 1, 128), 4096, 65536, PERFECT),
]


@pytest.mark.parametrize(("shape", "window", "stride", "tile_q", "tile_k", "visited", "total", "full"), TILED)
def test_published_tile_counts(shape, window, stride, tile_q, tile_k, visited, total, full):
    plan = dit_accel.plan("gna", TokenGrid(*shape), window=window, stride=stride)
    mask = plan.block_mask(order="tile", tile_q=tile_q, tile_k=tile_k)
    assert (mask.visited, mask.total) == (visited, total)
    if full is not None:
        assert mask.full == (visited if full == PERFECT else full)


def test_sliding_tiles_are_strided_windows():
    """STA with an odd number of tiles is gna with the tile as stride: its published tile pairs."""
    for shape, window, tiles in (
        (HUNYUAN, (3, 3, 3), 8100),
        (HUNYUAN, (5, 5, 5), 37500),
        (HUNYUAN, (3, 3, 5), 13500),
        (WAN768, (3, 3, 5), 8100),
        (WAN768, (3, 5, 5), 13500),
        (WAN768, (3, 3, 3), 4860),
    ):
        tokens = tuple(n * size for n, size in zip(window, (6, 8, 8), strict=True))
        plan = dit_accel.plan("gna", TokenGrid(*shape), window=tokens, stride=(6, 8, 8))
        mask = plan.block_mask(order="tile", tile_q=(6, 8, 8), tile_k=(6, 8, 8))
        assert mask.visited == mask.full == tiles
        assert plan.pairs == tiles * 384**2


@pytest.mark.parametrize(
    ("window", "length", "tokens"),
    [(0.5, 9, 5), (0.5, 10, 5), (1.0, 7, 7), (1, 7, 1), (0.01, 7, 1), ("full", 7, 7), (3, 7, 3), (0.25, 10, 3)],
)
def test_windows_are_counts_fractions_or_full(window, length, tokens):
    plan = dit_accel.plan("gna", TokenGrid(1, 1, length), window=(1, 1, window))
    assert plan.pairs == length * tokens


def test_a_fraction_is_of_one_residue():
    plan = dit_accel.plan("gna", TokenGrid(1, 1, 11), window=(1, 1, 0.5), dilation=(1, 1, 2))
    assert plan.pairs == 11 * 3  # floor(0.5 * floor(11 / 2) + 0.5)


def test_scalars_are_clamped_and_axes_of_one_token_are_full():
    grid = TokenGrid(1, 4, 9)
    assert dit_accel.plan("gna", grid, window=4, stride=3, dilation=2).pairs == 36 * 16
    plan = dit_accel.plan("gna", grid, window=(5, 2, 4), stride=4)
    assert plan.pairs == 36 * 8
    assert dit_accel.plan("gna", grid, window="full", dilation=3).density == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 5}, "window height 4"),
        ({"window": (1, 2, 5), "dilation": (1, 1, 2)}, "width"),
        ({"window": (1, 2, 4), "stride": (1, 3, 1)}, "stride window height"),
        ({"window": 0}, "window 0"),
        ({"window": 1.5}, "window 1.5"),
        ({"window": "half"}, "window 'half'"),
        ({"window": (2, 2)}, "window 3"),
        ({"window": 2, "stride": 0}, "stride 0"),
        ({"window": 2, "causal": 1}, "causal 1"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(DitAccelError, match=names(words)):
        dit_accel.plan("gna", TokenGrid(1, 4, 9), **settings)


def test_text_is_dense_both_ways():
    grid = TokenGrid(1, 4, 4, text=3, text_first=True, conditioning=2)
    plan = dit_accel.plan("gna", grid, window=(1, 1, 1))
    mask = plan.token_mask()
    assert plan.pairs == int(mask.sum()) == 21**2 - 16**2 + 16
    assert mask[:3].all()
    assert mask[:, -2:].all()
    assert torch.equal(mask[3:19, 3:19], torch.eye(16, dtype=torch.bool))


def test_the_default_window_is_the_papers_for_hunyuan_video():
    grid = TokenGrid(30, 48, 80)
    assert dit_accel.plan("gna", grid).pairs == grid.visual * 18 * 24 * 24
