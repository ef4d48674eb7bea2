"""What video families do besides the conformance checks: modes they refuse, and sparse calls of their own."""

import dataclasses
import types

import pytest
import tiny_models
import torch
from messages import names
from tiny_models import run, text_mask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel.pipelines import processor
from dit_accel.pipelines.family import Memory, ModelInputs
from dit_accel.registry import get_families
from dit_accel.tokens import TokenGrid


def layout(tiny, **changes):
    """What the family reads from the model's call with some arguments changed."""
    import inspect

    transformer = tiny.shared
    call = ModelInputs(inspect.signature(type(transformer).forward), transformer, (), tiny.call() | changes, Memory())
    return get_families()[tiny.family].layout(transformer, call)


def refused(tiny, match, **changes):
    """The call is refused before any attention has run."""
    with dit_accel.accelerated(tiny.shared, "gna", window=1) as accel:
        with pytest.raises(dit_accel.DitAccelError, match=match):
            run(tiny.shared, tiny.call() | changes)
        assert accel.report().sparse_calls == accel.report().dense_calls == 0


@pytest.mark.parametrize("tiny", [tiny for tiny in tiny_models.all_models() if tiny.video], ids=str)
def test_grid_and_text_lengths_are_read_from_the_call(tiny):
    call_layout = layout(tiny)
    assert call_layout.grid == tiny.grid
    assert (None if call_layout.text_lens is None else tuple(call_layout.text_lens.tolist())) == tiny.text_lens


def test_hunyuan_counts_valid_text_wherever_its_mask_has_it():
    """As the model does."""
    mask = torch.tensor([[1, 0, 1, 1] + [0] * 9, [0] * 12 + [1]])
    assert layout(tiny_models.get("hunyuan_video", "t2v"), encoder_attention_mask=mask).text_lens.tolist() == [3, 1]


def test_mochi_refuses_padding_inside_the_text():
    mask = torch.tensor([[1, 0, 1, 1] + [0] * 9, [1] * 13]).bool()
    refused(tiny_models.get("mochi", "t2v"), "valid tokens behind padding", encoder_attention_mask=mask)


def test_cogvideox_15_is_cut_along_time():
    tiny = tiny_models.get("cogvideox", "1.5")
    longer = tiny_models.numbers()(2, 6, 4, 14, 18)
    assert layout(tiny, hidden_states=longer).grid == dataclasses.replace(tiny.grid, frames=3)


@pytest.mark.parametrize("tiny", [tiny_models.get("ltx", "t2v"), tiny_models.get("ltx2", "2.0")], ids=str)
@pytest.mark.parametrize("changes", [{"num_frames": None}, {"width": 8}, {"num_frames": 5.0}, {"height": 8}])
def test_packed_video_without_its_sizes_is_refused(tiny, changes):
    with pytest.raises(dit_accel.DitAccelError, match=names("315")):
        layout(tiny, **changes)


def test_coordinates_tell_where_the_video_is():
    tiny = tiny_models.get("ltx", "condition")
    places = tiny_models.module("ltx").places
    assert torch.equal(layout(tiny).rows, tiny.rows)

    def read(*pieces):
        coordinates = torch.cat([places(*sizes, start=start) for *sizes, start in pieces], 1)
        call = {"hidden_states": torch.zeros(2, coordinates.shape[1], 4), "video_coords": coordinates.repeat(2, 1, 1)}
        return layout(tiny, **call)

    alone = read((5, 7, 9, 0))
    assert (alone.grid, alone.rows) == (TokenGrid(5, 7, 9), None)
    assert read((1, 7, 9, 8)).grid == TokenGrid(1, 7, 9)
    other = read((2, 3, 4, 8), (1, 7, 9, 30), (3, 7, 9, 0))
    assert other.grid == TokenGrid(3, 7, 9, conditioning=87) and other.rows[0, :2].tolist() == [87, 88]
    for irregular in ([(5, 7, 9, 0), (5, 3, 4, 50)], [(1, 7, 9, 0), (1, 7, 8, 20)]):
        with pytest.raises(dit_accel.DitAccelError, match=names("place")):
            read(*irregular)


def test_coordinates_that_are_no_raster_are_refused():
    tiny = tiny_models.get("ltx2", "keyframe")
    coordinates = tiny.call()["video_coords"]
    order = torch.randperm(378, generator=torch.Generator().manual_seed(0))
    differing = torch.stack((coordinates[0], coordinates[1] + 1))
    for wrong in (coordinates[:, :, order], differing, coordinates[:, :, :-1], coordinates[:, :2]):
        with pytest.raises(dit_accel.DitAccelError, match=names("378")):
            layout(tiny, video_coords=wrong)


def test_minimax_h3_without_sound_keeps_conditions_dense():
    """A keyframe of the first frame's time right before the video, which starts where its places start again."""
    tiny = tiny_models.get("minimax_h3", "t2va")
    places, _, _, sound, *_ = tiny_models.module("minimax_h3").layout(("first",))
    before, after = places[: sound[0]], places[sound[-1] + 1 :]
    call_layout = layout(tiny, position_ids=torch.cat((before, after)), video_indices=torch.arange(7, 7 + 6 * 63))
    assert call_layout.grid == TokenGrid(5, 7, 9, text=7 + 63, text_first=True)
    assert call_layout.notes == ("70 tokens of text, conditions and sound are dense both ways",)


def test_minimax_h3_that_does_not_end_with_a_video_is_refused():
    tiny = tiny_models.get("minimax_h3", "t2va")
    places, video = (tiny.call()[name] for name in ("position_ids", "video_indices"))
    behind = torch.cat((places, places[:1]))
    for changes in (
        {"video_indices": video[:-1]},
        {"video_indices": video[:0]},
        {"position_ids": behind},
        {"position_ids": places[:-1], "video_indices": video[:-1]},
    ):
        with pytest.raises(dit_accel.DitAccelError, match=names("target")):
            layout(tiny, **changes)


def test_modes_with_masks_of_their_own_are_refused():
    refused(tiny_models.get("allegro", "t2v"), "attention_mask", attention_mask=torch.ones(2, 5, 14, 18))
    tokens = TokenGrid(5, 7, 9).visual
    mask = torch.ones(2, tokens, tokens)
    refused(tiny_models.get("ltx2", "2.0"), "video_self_attention_mask", video_self_attention_mask=mask)


@pytest.mark.parametrize("config", [{"window": "full"}, {"window": (3, 5, 4)}], ids=["all pairs", "window"])
def test_diffusion_forcing_with_one_frame_a_block(config):
    """Each frame has its own timestep; the model masks nothing."""
    tiny = tiny_models.get("skyreels_v2", "t2v")
    call = tiny.call() | {"enable_diffusion_forcing": True, "timestep": torch.tensor([[900, 800, 700, 600, 500]] * 2)}
    wanted = run(tiny.shared, call)
    assert (wanted - tiny.dense).abs().max() > 1e-3
    with dit_accel.accelerated(tiny.shared, "gna", **config) as accel:
        sparse = run(tiny.shared, call)
        assert {layer.sparse_calls for layer in accel.report().layers} == {1}
    if config["window"] == "full":
        torch.testing.assert_close(sparse, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert (sparse - wanted).abs().max() > 1e-3


def test_forcing_counts_steps_by_the_frame_furthest_behind():
    """The pipeline steps copies of its scheduler, one a frame, so that only the timesteps tell the step."""
    from diffusers import UniPCMultistepScheduler

    tiny = tiny_models.get("skyreels_v2", "t2v")
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0)
    scheduler.set_timesteps(4)
    first, second, third, _ = scheduler.timesteps.tolist()

    class Pipeline(types.SimpleNamespace):
        pass

    pipe = Pipeline(components={"transformer": tiny.shared}, scheduler=scheduler)
    dense = {0: [first] * 5, 1: [0, second, first, first, first], 2: [0, third, third, second, second]}
    with dit_accel.accelerated(pipe, "gna", window=(3, 5, 4), dense_steps=1) as accel:
        for timesteps in dense.values():
            call = {"enable_diffusion_forcing": True, "timestep": torch.tensor([timesteps] * 2)}
            run(tiny.shared, tiny.call() | call)
        assert {(layer.dense_calls, layer.sparse_calls) for layer in accel.report().layers} == {(2, 1)}


def test_causal_blocks_are_refused():
    tiny = tiny_models.get("skyreels_v2", "t2v")
    transformer = tiny.build()
    transformer.register_to_config(num_frame_per_block=5)
    with (
        dit_accel.accelerated(transformer, "gna", window=1),
        pytest.raises(dit_accel.DitAccelError, match=names("num_frame_per_block=5")),
    ):
        run(transformer, tiny.call())


def test_a_layer_whose_attention_the_model_skips_stays_skipped():
    tiny = tiny_models.get("ltx2", "2.3")
    inputs = tiny.call() | {"spatio_temporal_guidance_blocks": [1]}
    with dit_accel.accelerated(tiny.shared, "gna", window="full") as accel:
        sparse = run(tiny.shared, inputs)
    torch.testing.assert_close(sparse, run(tiny.shared, inputs))
    assert [layer.sparse_calls for layer in accel.report().layers] == [1, 0]


def test_vace_runs_its_control_blocks_first():
    tiny = tiny_models.get("wan", "vace")
    layers = [name for name, _ in get_families()["wan"].attentions(tiny.shared)]
    assert layers == ["vace_blocks.0.attn1", "blocks.0.attn1", "blocks.1.attn1"]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_hunyuan_15_makes_no_mask_of_all_pairs(monkeypatch):
    """The whole processor without its attention: nothing as large as tokens x tokens, which the model's own makes."""
    tiny = tiny_models.get("hunyuan_video_15", "i2v")
    attn, tokens = tiny.shared.transformer_blocks[0].attn, tiny.grid.tokens
    noise = tiny_models.numbers()
    video, text, mask = noise(2, tiny.grid.visual, 24), noise(2, tiny.grid.text, 24), text_mask((10, 9), 16, 2)
    with LargestTensor() as stock:
        attn(video, text, attention_mask=mask)
    assert stock.elements >= tokens**2
    monkeypatch.setattr(processor, "attend", lambda q, k, v: v)
    (attend,) = get_families()["hunyuan_video_15"].sparse_calls.values()
    with LargestTensor() as sparse:
        streams = attend(attn.processor, attn, video, text, mask)
    assert sparse.elements < tokens**2 / 4
    assert [tuple(stream.shape) for stream in streams] == [tuple(video.shape), tuple(text.shape)]


class AttentionCalls(TorchFunctionMode):
    """Counts attention calls, dense or replaced."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_mochi_does_not_loop_over_samples():
    """Sparse calls attend once a layer for the whole batch; the text's pooling calls dense attention once."""
    tiny = tiny_models.get("mochi", "t2v")
    inputs = tiny.call(batch=5)
    with AttentionCalls() as dense:
        run(tiny.shared, inputs)
    with dit_accel.accelerated(tiny.shared, "gna", window=1) as accel, AttentionCalls() as sparse:
        run(tiny.shared, inputs)
    assert (dense.count, sparse.count) == (1 + 2 * 5, 1 + 2)
    assert [layer.sparse_calls for layer in accel.report().layers] == [1, 1]


@pytest.mark.parametrize("family", ["mochi", "cosmos"])
def test_timesteps_in_other_units_need_set_step(family):
    tiny = next(tiny for tiny in tiny_models.all_models() if tiny.family == family)
    with dit_accel.accelerated(tiny.shared, "gna", window=1, dense_steps=1) as accel:
        with pytest.raises(dit_accel.DitAccelError, match=names("set_step")):
            run(tiny.shared, tiny.call())
        accel.set_step(0, 2)
        assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)
        accel.set_step(1, 2)
        run(tiny.shared, tiny.call())
    assert accel.report().sparse_calls == accel.report().dense_calls == 2
