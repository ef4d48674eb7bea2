"""Attention tile: the paper's sparsities and block counts."""

import pytest
import torch
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.methods.tile import reference_frames
from dit_accel.tokens import TokenGrid

IN_MODELS = {"references": 1}
OSP29, OSP93, WAN720, WAN480 = (8, 45, 80), (24, 45, 80), (21, 45, 80), (21, 30, 52)
COGVIDEOX, COSMOS = (13, 30, 45), (16, 44, 80)


@pytest.mark.parametrize(
    ("shape", "references", "sparsity"),
    [
        (OSP29, 4, 17.60),
        (OSP29, 3, 29.88),
        (OSP29, 2, 45.47),
        (OSP29, 1, 64.38),
        (OSP93, 12, 21.51),
        (OSP93, 8, 40.30),
        (OSP93, 6, 51.88),
        (OSP93, 4, 64.98),
        (OSP93, 3, 72.05),
    ],
)
def test_the_papers_sparsities(shape, references, sparsity):
    mask = dit_accel.plan("tile", TokenGrid(*shape), references=references).block_mask(128, 128)
    assert round(100 * (1 - mask.density), 2) == sparsity


@pytest.mark.parametrize(
    ("shape", "references", "pairs", "b64", "b128"),
    [
        (OSP93, 12, 444 * 12_960_000, None, 357609),
        (OSP93, 8, 336 * 12_960_000, None, 272027),
        (OSP93, 3, 156 * 12_960_000, None, 127353),
        (WAN720, 7, 3_356_640_000, 828386, 209821),
        (WAN720, 4, 2_190_240_000, 541554, 137543),
        (WAN720, 3, 1_749_600_000, 433022, 110161),
        (WAN720, 2, 1_283_040_000, 317992, 80985),
        (WAN720, 1, 790_560_000, 196352, 50183),
        (WAN480, 7, 630_302_400, 157600, 40420),
        (WAN480, 3, 328_536_000, 82468, 21404),
        (WAN480, 1, 148_449_600, 37664, 9878),
        (COGVIDEOX, 4, 176_782_500, 44793, 11480),
        (COGVIDEOX, 3, 143_977_500, 36979, 9644),
        (COGVIDEOX, 2, 107_527_500, 27495, 7214),
        (COGVIDEOX, 1, 67_432_500, 17415, 4494),
        (COSMOS, 4, 1_536_409_600, 375100, 95200),
        (COSMOS, 2, 916_889_600, 223850, 57004),
        (COSMOS, 1, 569_958_400, 139150, 35554),
    ],
)
def test_published_counts(shape, references, pairs, b64, b128):
    plan = dit_accel.plan("tile", TokenGrid(*shape), references=references)
    assert plan.pairs == pairs
    assert b64 is None or plan.block_mask(64, 64, order="raster").visited == b64
    assert plan.block_mask(128, 128, order="raster").visited == b128


def test_reference_frames_are_spread():
    assert reference_frames(21, 4).tolist() == [0, 6, 12, 18]
    assert reference_frames(8, 8).tolist() == list(range(8))
    assert reference_frames(10, 6).tolist() == [0, 2, 4, 6, 8]


def test_the_mask_is_rows_and_columns_of_reference_frames():
    mask = dit_accel.plan("tile", TokenGrid(5, 1, 2), references=2).token_mask()[::2, ::2]
    expected = torch.eye(5, dtype=torch.bool)
    expected[[0, 3]] = True
    expected[:, [0, 3]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("references", "words"), [(6, "references 5"), (0, "references 0"), (2.0, "references 2.0")])
def test_bad_settings_are_refused(references, words):
    with pytest.raises(DitAccelError, match=names(words)):
        dit_accel.plan("tile", TokenGrid(5, 2, 2), references=references)
