"""Grids read from calls, and modules found by path."""

import pytest
import torch
from messages import names

from dit_accel import registry
from dit_accel.errors import DitAccelError
from dit_accel.pipelines import reading
from dit_accel.pipelines.family import Memory, ModelInputs, patch_grid
from dit_accel.pipelines.reading import image_grids
from dit_accel.tokens import TokenGrid

FLUX, WAN = (registry.get_families()[name] for name in ("flux", "wan"))


def read(family, transformer, inputs, memory=None):
    import inspect

    signature = inspect.signature(type(transformer).forward)
    return family.layout(transformer, ModelInputs(signature, transformer, (), inputs, memory or Memory()))


def ids(*images, dtype=torch.float32, start=(0, 0)):
    tokens = [
        torch.tensor([index, start[0] + row, start[1] + column], dtype=torch.float64)
        for index, (height, width) in enumerate(images)
        for row in range(height)
        for column in range(width)
    ]
    return torch.stack(tokens).to(dtype)


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        ([(4, 6)], (1, 4, 6, 0)),
        ([(1, 6)], (1, 1, 6, 0)),
        ([(6, 1)], (1, 6, 1, 0)),
        ([(1, 1)], (1, 1, 1, 0)),
        ([(4, 6), (4, 6)], (2, 4, 6, 0)),
        ([(4, 6), (6, 4)], (1, 4, 6, 24)),
        ([(4, 6), (4, 6), (2, 3), (4, 6)], (2, 4, 6, 30)),
    ],
)
def test_image_grids(images, wanted):
    assert image_grids(ids(*images)) == wanted


def test_image_grids_survive_the_rounding_of_bfloat16():
    rows = ids((600, 3), dtype=torch.bfloat16)
    assert float(rows[-1, 1]) == 600
    assert image_grids(rows) == (1, 600, 3, 0)


def test_image_grids_may_start_anywhere():
    assert image_grids(ids((4, 6), start=(32, 5))) == (1, 4, 6, 0)


@pytest.mark.parametrize(
    "broken",
    [ids((4, 6))[:-1], ids((4, 6))[torch.randperm(24, generator=torch.Generator().manual_seed(0))], ids((4, 6))[::2]],
    ids=["cut off", "shuffled", "every other"],
)
def test_ids_that_are_no_grid_are_refused(broken):
    with pytest.raises(DitAccelError, match=names("grid")):
        image_grids(broken)


def test_ids_that_are_no_grid_may_follow_as_reference():
    assert image_grids(torch.cat((ids((4, 6)), ids((1, 1), (4, 6))[1:-1]))) == (1, 4, 6, 23)


def test_patches_cut_off_remainders():
    assert patch_grid((5, 15, 18), (1, 2, 2)) == TokenGrid(5, 7, 9)
    with pytest.raises(DitAccelError, match=names("patch")):
        patch_grid((1, 1, 2), (1, 2, 2))


def test_wan_reads_the_latent(tiny_wan, wan_inputs):
    transformer = tiny_wan()
    assert read(WAN, transformer, wan_inputs(3, 8, 10)).grid == TokenGrid(3, 4, 5)
    with pytest.raises(DitAccelError, match=names("hidden_states 5")):
        read(WAN, transformer, {"hidden_states": torch.zeros(2, 3)})


def test_flux_reads_ids_and_text(tiny_flux, flux_inputs):
    transformer = tiny_flux()
    inputs = flux_inputs((4, 6), text=5)
    assert read(FLUX, transformer, inputs).grid == TokenGrid(1, 4, 6, text=5, text_first=True)
    batched = inputs | {"img_ids": inputs["img_ids"].expand(2, -1, -1)}
    assert read(FLUX, transformer, batched).grid == TokenGrid(1, 4, 6, text=5, text_first=True)


def test_flux_takes_conditioning_images_as_frames_or_reference(tiny_flux, flux_inputs):
    transformer = tiny_flux()
    assert read(FLUX, transformer, flux_inputs((4, 6), (4, 6))).grid.frames == 2
    layout = read(FLUX, transformer, flux_inputs((4, 6), (3, 3)))
    assert layout.grid == TokenGrid(1, 4, 6, text=13, text_first=True, conditioning=9)
    assert "9 tokens" in layout.notes[0]


def test_flux_refuses_ids_that_do_not_fit(tiny_flux, flux_inputs):
    inputs = flux_inputs((4, 6))
    for wrong in (None, inputs["img_ids"][:-1], torch.zeros(24)):
        with pytest.raises(DitAccelError, match=names("img_ids 24")):
            read(FLUX, tiny_flux(), inputs | {"img_ids": wrong})


def test_ids_are_read_once_while_they_stay_the_same(tiny_flux, flux_inputs, monkeypatch):
    reads = []
    monkeypatch.setattr(reading, "image_grids", lambda ids: reads.append(len(ids)) or (1, len(ids), 1, 0))
    transformer, inputs, memory = tiny_flux(), flux_inputs((4, 6)), Memory()
    for _ in range(3):
        read(FLUX, transformer, inputs, memory)
    assert reads == [24]
    inputs["img_ids"][0, 1] = 1
    read(FLUX, transformer, inputs, memory)
    read(FLUX, transformer, flux_inputs((4, 5)), memory)
    assert reads == [24, 24, 20]


def test_self_attention_is_found_in_the_order_it_runs(tiny_wan, tiny_flux):
    layers = [name for name, _ in WAN.attentions(tiny_wan(12))]
    assert layers == [f"blocks.{index}.attn1" for index in range(12)]
    assert [name for name, _ in FLUX.attentions(tiny_flux())] == [
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]


def test_compiled_blocks_are_found(tiny_wan):
    transformer = tiny_wan()
    transformer.blocks[1] = torch.compile(transformer.blocks[1], backend="eager")
    assert len(list(WAN.attentions(transformer))) == 2


def test_head_dim(tiny_wan, tiny_flux):
    for family, transformer, wanted in ((WAN, tiny_wan(), 12), (FLUX, tiny_flux(), 16)):
        assert {family.head_dim(attention) for _, attention in family.attentions(transformer)} == {wanted}


@pytest.mark.parametrize("name", registry.list_families())
def test_a_family_is_complete(name):
    import diffusers

    from dit_accel.schedule import Schedule

    family = registry.get_families()[name]
    assert family.name == name and family.summary
    for transformer in family.transformers:
        assert hasattr(diffusers, transformer)
    assert set(family.recommended_pair) <= set(family.recommended)
    for method, preset in (*family.recommended.items(), *family.recommended_pair.items()):
        registry.make_config(method, preset.config)
        Schedule(**preset.schedule)
        assert preset.source
