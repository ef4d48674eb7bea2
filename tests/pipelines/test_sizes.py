"""Sizes of published models, as their papers and cards count tokens."""

import importlib

import pytest
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.sizes import vae_frames, vae_pixels
from dit_accel.registry import family_of, get_families
from dit_accel.tokens import TokenGrid

KL = {"block_out_channels": [128, 256, 512, 512]}
WAN_VAE = {"temperal_downsample": [False, True, True]}
WAN_22_VAE = WAN_VAE | {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
HUNYUAN_VAE = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
LTX_VAE = {"patch_size": 4, "patch_size_t": 1, "spatio_temporal_scaling": [True, True, True, False]}
H3_VAE = {"spatial_downsample_factors": [2, 2, 2, 2, 1, 1], "temporal_downsample_factors": [1, 2, 2, 1, 1, 1]}
H3_VAE |= {"clip_length": 17, "token_drop": 3}
PATCHES = {"patch_size_t": 1, "patch_size": 2}
ROPE = {"rope_max_seq_len": 1024}

# Class, settings of the transformer, of the VAE, asked frames, height and width (None: the pipeline's own), the grid.
CASES = [
    ("WanTransformer3DModel", {"patch_size": [1, 2, 2]} | ROPE, WAN_VAE, None, TokenGrid(21, 30, 52)),
    ("WanVACETransformer3DModel", {"patch_size": [1, 2, 2]} | ROPE, WAN_VAE, (81, 720, 1280), TokenGrid(21, 45, 80)),
    ("WanTransformer3DModel", {"patch_size": [1, 2, 2]} | ROPE, WAN_22_VAE, (121, 704, 1280), TokenGrid(31, 22, 40)),
    ("AnyFlowTransformer3DModel", {"patch_size": [1, 2, 2]} | ROPE, WAN_VAE, None, TokenGrid(21, 30, 52)),
    ("SkyReelsV2Transformer3DModel", {"patch_size": [1, 2, 2]} | ROPE, WAN_VAE, None, TokenGrid(25, 34, 60)),
    ("HunyuanVideoTransformer3DModel", PATCHES, HUNYUAN_VAE, None, TokenGrid(33, 45, 80, text=256)),
    (
        "HunyuanVideo15Transformer3DModel",
        {"patch_size_t": 1, "patch_size": 1, "target_size": 960},
        {"spatial_compression_ratio": 16, "temporal_compression_ratio": 4},
        None,
        TokenGrid(31, 45, 80, text=1985),
    ),
    (
        "CogVideoXTransformer3DModel",
        {"patch_size": 2, "sample_frames": 49, "sample_height": 60, "sample_width": 90, "max_text_seq_length": 226},
        KL | {"temporal_compression_ratio": 4},
        None,
        TokenGrid(13, 30, 45, text=226, text_first=True),
    ),
    (
        "CogVideoXTransformer3DModel",
        {"patch_size_t": 2, "sample_frames": 81, "sample_height": 96, "sample_width": 170, "max_text_seq_length": 226}
        | {"patch_size": 2},
        KL | {"temporal_compression_ratio": 4},
        None,
        TokenGrid(11, 48, 85, text=226, text_first=True),
    ),
    ("MochiTransformer3DModel", {"patch_size": 2}, {}, (163, 480, 848), TokenGrid(28, 30, 53, text=256)),
    ("LTXVideoTransformer3DModel", PATCHES | {"patch_size": 1}, LTX_VAE, None, TokenGrid(21, 16, 22)),
    ("LTX2VideoTransformer3DModel", PATCHES | {"patch_size": 1}, LTX_VAE, None, TokenGrid(16, 16, 24)),
    (
        "MiniMaxH3Transformer3DModel",
        {"patch_size": [1, 2, 2]},
        H3_VAE,
        None,
        TokenGrid(37, 24, 42, text=512 + 2 * 207, text_first=True),
    ),
    (
        "CosmosTransformer3DModel",
        {"patch_size": [1, 2, 2]},
        {"spatial_compression_ratio": 8, "temporal_compression_ratio": 8},
        None,
        TokenGrid(16, 44, 80),
    ),
    ("CosmosTransformer3DModel", {"patch_size": [1, 2, 2]}, WAN_VAE, None, TokenGrid(24, 44, 80)),
    (
        "AllegroTransformer3DModel",
        PATCHES | {"sample_frames": 22, "sample_height": 90, "sample_width": 160},
        KL | {"temporal_compression_ratio": 4},
        None,
        TokenGrid(22, 45, 80),
    ),
    ("EasyAnimateTransformer3DModel", {"patch_size": 2}, KL, None, TokenGrid(13, 32, 32, text=256, text_first=True)),
    (
        "HeliosTransformer3DModel",
        {"patch_size": [1, 2, 2]},
        WAN_VAE,
        None,
        TokenGrid(9, 24, 40, text=4 * 6 * 10 + 12 * 20 + 2 * 24 * 40, text_first=True),
    ),
    ("Kandinsky5Transformer3DModel", {"patch_size": [1, 2, 2]}, HUNYUAN_VAE, None, TokenGrid(31, 32, 48)),
    ("Kandinsky6Transformer3DModel", {"patch_size": [1, 2, 2]}, HUNYUAN_VAE, None, TokenGrid(31, 32, 48)),
    ("FluxTransformer2DModel", {}, KL, (None, 4096, 4096), TokenGrid(1, 256, 256, text=512, text_first=True)),
    (
        "OvisImageTransformer2DModel",
        {"_class_name": "OvisImageTransformer2DModel"},
        KL,
        None,
        TokenGrid(1, 64, 64, text=256, text_first=True),
    ),
    ("Flux2Transformer2DModel", {}, KL, None, TokenGrid(1, 64, 64, text=512, text_first=True)),
    ("Flux3Transformer2DModel", {}, KL, None, TokenGrid(1, 64, 64, text=512, text_first=True)),
    ("BriaTransformer2DModel", {}, KL, None, TokenGrid(1, 64, 64, text=128, text_first=True)),
    ("NucleusMoEImageTransformer2DModel", {}, WAN_VAE, None, TokenGrid(1, 64, 64, text=1024)),
    (
        "PRXTransformer2DModel",
        {"patch_size": 1},
        {"encoder_block_out_channels": [128] * 6},
        None,
        TokenGrid(1, 16, 16, text=256, text_first=True),
    ),
    (
        "BriaFiboTransformer2DModel",
        {"_class_name": "BriaFiboTransformer2DModel"},
        {"scale_factor_spatial": 16},
        None,
        TokenGrid(1, 64, 64, text=3000, text_first=True),
    ),
    (
        "SD3Transformer2DModel",
        {"patch_size": 2, "sample_size": 128, "pos_embed_max_size": 192},
        KL,
        None,
        TokenGrid(1, 64, 64, text=333),
    ),
    (
        "QwenImageTransformer2DModel",
        {},
        WAN_VAE,
        (None, 1328, 1328),
        TokenGrid(1, 83, 83, text=512, text_first=True),
    ),
    ("Ideogram4Transformer2DModel", {}, KL, None, TokenGrid(1, 128, 128, text=2048, text_first=True)),
    ("Krea2Transformer2DModel", {}, WAN_VAE, None, TokenGrid(1, 64, 64, text=512, text_first=True)),
    ("ErnieImageTransformer2DModel", {"patch_size": 1}, KL, None, TokenGrid(1, 64, 64, text=512)),
    (
        "ZImageTransformer2DModel",
        {"axes_lens": [1536, 512, 512]},
        KL,
        (None, 720, 1008),
        TokenGrid(1, 45, 63, text=512, conditioning=13),
    ),
    (
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "max_resolution": [128, 128]},
        KL,
        (None, 768, 1024),
        TokenGrid(1, 48, 64, text=384, conditioning=1024),
    ),
    (
        "Lumina2Transformer2DModel",
        {"patch_size": 2, "sample_size": 128, "axes_lens": [300, 512, 512]},
        KL,
        None,
        TokenGrid(1, 64, 64, text=256, text_first=True),
    ),
    ("HunyuanDiT2DModel", {"patch_size": 2, "sample_size": 128}, KL, None, TokenGrid(1, 64, 64)),
    ("LuminaNextDiT2DModel", {"patch_size": 2, "sample_size": 128}, KL, None, TokenGrid(1, 64, 64)),
    (
        "HunyuanVideoFramepackTransformer3DModel",
        PATCHES,
        HUNYUAN_VAE,
        None,
        TokenGrid(9, 45, 80, text=985, conditioning=2 * 45 * 80 + 23 * 40 + 4 * 12 * 20),
    ),
    ("PixArtTransformer2DModel", {"patch_size": 2, "sample_size": 128}, KL, None, TokenGrid(1, 64, 64)),
    (
        "CogView3PlusTransformer2DModel",
        {"patch_size": 2, "sample_size": 128, "pos_embed_max_size": 128}
        | {"_class_name": "CogView3PlusTransformer2DModel"},
        KL,
        None,
        TokenGrid(1, 64, 64, text=224, text_first=True),
    ),
    (
        "AuraFlowTransformer2DModel",
        {"patch_size": 2, "sample_size": 64, "pos_embed_max_size": 9216},
        KL,
        (None, 1024, 1024),
        TokenGrid(1, 64, 64, text=264, text_first=True),
    ),
    (
        "HunyuanImageTransformer2DModel",
        {"patch_size": [1, 1]},
        {"spatial_compression_ratio": 32},
        None,
        TokenGrid(1, 64, 64, text=1128),
    ),
    ("JoyImageEditTransformer3DModel", {"patch_size": [1, 2, 2]}, WAN_VAE, None, TokenGrid(1, 64, 64, text=1024)),
    ("GlmImageTransformer2DModel", {"patch_size": 2}, KL, None, TokenGrid(1, 64, 64, text=2048, text_first=True)),
]


@pytest.mark.parametrize(("name", "transformer", "vae", "size", "grid"), CASES, ids=[case[0] for case in CASES])
def test_grid_of_a_published_model(name, transformer, vae, size, grid):
    sizes = family_of([name]).sizes(transformer, vae)
    assert sizes.grid(*sizes.chosen(*(size or (None, None, None)))) == grid
    assert sizes.video == (grid.frames > 1)


PUBLISHED = {("LTX2VideoTransformer3DModel", "sol"), ("MiniMaxH3Transformer3DModel", "sol")}


@pytest.mark.parametrize(("name", "transformer", "vae"), [case[:3] for case in CASES], ids=[case[0] for case in CASES])
def test_video_families_recommend_what_stays_dense_without_fine_tuning(name, transformer, vae):
    """A fifth of the steps and the first layer, where blocks are chosen by content and nobody published more."""
    family = family_of([name])
    for method in ("sol", "sparge", "rectified") if family.sizes(transformer, vae).video else ():
        preset = family.preset(method)
        if (name, method) in PUBLISHED:
            assert "pull request" in preset.source
            continue
        schedule = preset.schedule
        assert schedule["dense_steps"] == 0.2 and schedule["dense_layers"] >= 1


def test_every_family_has_a_case():
    assert {family_of([case[0]]).name for case in CASES} == set(get_families())


def test_a_video_in_which_no_frame_stands_alone():
    sizes = next(family_of([case[0]]).sizes(*case[1:3]) for case in CASES if case[0].startswith("Allegro"))
    with pytest.raises(DitAccelError, match=names("81 80 84")):
        sizes.chosen(81, None, None)


def test_minimax_h3_counts_frames_and_sound_as_its_pipeline_does():
    pipeline = importlib.import_module("diffusers.modular_pipelines.minimax_h3.modular_pipeline")
    sizes = family_of(["MiniMaxH3Transformer3DModel"]).sizes({"patch_size": [1, 2, 2]}, H3_VAE)
    for frames in range(124, 346, 17):
        assert pipeline.align_num_frames(frames, 17, 5) == frames
        sound = 2 * pipeline.audio_latent_num_frames(frames)
        grid = sizes.grid(*sizes.chosen(frames, None, None))
        assert (grid.frames, grid.text) == (pipeline.video_latent_num_frames(frames, 17, 5), 512 + sound)
    with pytest.raises(DitAccelError, match=names("121 5 17 107 124")):
        sizes.chosen(121, None, None)


def test_an_image_that_hidream_has_no_room_for():
    name, transformer, vae, *_ = next(case for case in CASES if case[0].startswith("HiDream"))
    sizes = family_of([name]).sizes(transformer, vae)
    assert sizes.grid(1, 2048, 2048).conditioning == 0
    with pytest.raises(DitAccelError, match=names("64 4096")):
        sizes.grid(1, 1024, 1536)


@pytest.mark.parametrize(
    ("vae", "strides"),
    [(WAN_VAE, (4, 8)), (WAN_22_VAE, (4, 16)), (HUNYUAN_VAE, (4, 8)), (LTX_VAE, (8, 32))],
)
def test_strides_of_a_vae(vae, strides):
    assert (vae_frames(vae), vae_pixels(vae)) == strides
