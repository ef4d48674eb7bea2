"""Accelerated pipelines: steps from the scheduler, guidance, two transformers, image to video and image to image."""

import gc

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from messages import names

import dit_accel

WINDOW = {"window": (2, 3, 4)}


@pytest.fixture
def wan_pipe(tiny_wan):
    def make(kind=WanPipeline, scheduler=None, **components):
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
        components = {"transformer": tiny_wan()} | components
        pipe = kind(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def flux_pipe(tiny_flux):
    def make(kind=FluxPipeline):
        names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = kind(scheduler=scheduler, transformer=tiny_flux(), **dict.fromkeys(names))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def generate(pipe, steps=4, guidance=3.0, batch=1, size=(80, 112), frames=9, **arguments):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, batch, 7, 16, generator=torch.Generator().manual_seed(2))
    negative = {"negative_prompt_embeds": text[1]} if guidance > 1 else {}
    return pipe(
        prompt_embeds=text[0], height=size[0], width=size[1], num_frames=frames, num_inference_steps=steps,
        guidance_scale=guidance, generator=generator, output_type="latent", **negative, **arguments,
    ).frames  # fmt: skip


def draw(pipe, steps=4, size=(176, 208), **arguments):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=text, pooled_prompt_embeds=torch.ones(1, 12), height=size[0], width=size[1],
        num_inference_steps=steps, generator=generator, output_type="latent", **arguments,
    ).images  # fmt: skip


def reasons(accel):
    """Sparse calls and dense reasons of the layers, which must agree."""
    layers = accel.report().layers
    assert all(layer.dense_reasons == layers[0].dense_reasons for layer in layers)
    (sparse,) = {layer.sparse_calls for layer in layers}
    return sparse, layers[0].dense_reasons


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler,
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=["euler", "unipc"],
)
def test_steps_come_from_the_scheduler_under_guidance(scheduler, wan_pipe):
    pipe = wan_pipe(scheduler=scheduler())
    methods = vars(pipe.scheduler).copy()
    with dit_accel.accelerate(pipe, "gna", dense_steps=2, dense_last_steps=0.2, **WINDOW) as accel:
        generate(pipe, steps=6)
        assert reasons(accel) == (6, {"dense_steps=2": 4, "dense_last_steps=0.2": 2})
        generate(pipe, steps=3, guidance=1.0)
        assert reasons(accel) == (6, {"dense_steps=2": 6, "dense_last_steps=0.2": 3})
    assert vars(pipe.scheduler).keys() >= methods.keys()
    assert not any(callable(value) for value in vars(pipe.scheduler).values() if not isinstance(value, type))


def test_a_batch_under_guidance_equals_one_by_one(wan_pipe):
    pipe = wan_pipe()
    with dit_accel.accelerate(pipe, "gna", dense_steps=1, **WINDOW) as accel:
        both = generate(pipe, batch=2)
        latents = torch.randn(2, 4, 3, 10, 14, generator=torch.Generator().manual_seed(0))
        text = torch.randn(2, 2, 7, 16, generator=torch.Generator().manual_seed(2))
        assert reasons(accel) == (6, {"dense_steps=1": 2})
        for sample in range(2):
            alone = pipe(
                prompt_embeds=text[0, sample : sample + 1], negative_prompt_embeds=text[1, sample : sample + 1],
                latents=latents[sample : sample + 1], height=80, width=112, num_frames=9, num_inference_steps=4,
                guidance_scale=3.0, output_type="latent",
            ).frames  # fmt: skip
            torch.testing.assert_close(alone[0], both[sample], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [("dense", {}), ("gna", {"dense_steps": 1.0, **WINDOW})], ids=["method", "steps"])
def test_dense_is_bit_identical(method, wan_pipe):
    pipe = wan_pipe()
    name, config = method
    before = generate(pipe)
    with dit_accel.accelerate(pipe, name, **config):
        assert torch.equal(generate(pipe), before)
    assert torch.equal(generate(pipe), before)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize(
    "method", ["sparge:block=16,block_q=16,refresh=2", "gna:window=2x3x4,share=residual,refresh=2"]
)
def test_nothing_is_kept_behind_a_run(method, steps, last, wan_pipe):
    """Whether the last step refreshes, reuses or is dense."""
    pipe = wan_pipe()
    with dit_accel.accelerate(pipe, method, dense_last_steps=last) as accel:
        generate(pipe, steps=steps)
        report = accel.report()
        assert all(layer.kept_bytes for layer in report.layers)
        assert not any(layer.ours.stored for engine in accel._engines for layer in engine.layers)


def test_two_transformers_share_the_trajectory(wan_pipe, tiny_wan):
    """Wan 2.2: the second transformer takes over in the middle, and its first step is no first step."""
    pipe = wan_pipe(transformer_2=tiny_wan(3), boundary_ratio=0.8)
    with dit_accel.accelerate(pipe, "gna", dense_steps=1, dense_last_steps=1, **WINDOW) as accel:
        generate(pipe, steps=8)
        report = accel.report()
    first, second = ([layer for layer in report.layers if layer.transformer == name] for name in report.calls)
    assert sum(report.calls.values()) == 16 and min(report.calls.values()) >= 4
    assert len(first) == 2 and len(second) == 3
    assert first[0].dense_reasons == {"dense_steps=1": 2} and second[0].dense_reasons == {"dense_last_steps=1": 2}
    assert first[0].sparse_calls + second[0].sparse_calls == 12


def test_per_token_timesteps(wan_pipe):
    """Wan 2.2 TI2V gives every token its own timestep."""
    pipe = wan_pipe(expand_timesteps=True)
    with dit_accel.accelerate(pipe, "gna", dense_steps=1, **WINDOW) as accel:
        generate(pipe, guidance=1.0)
        assert reasons(accel) == (3, {"dense_steps=1": 1})
    transformer = pipe.transformer
    with dit_accel.accelerate(transformer, "gna", dense_steps=1, **WINDOW) as accel:
        generate(pipe, guidance=1.0)
        assert reasons(accel) == (3, {"dense_steps=1": 1})


def test_a_replaced_scheduler_is_followed(wan_pipe):
    pipe = wan_pipe()
    with dit_accel.accelerate(pipe, "gna", dense_steps=1, **WINDOW) as accel:
        generate(pipe, guidance=1.0)
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=2.0)
        generate(pipe, steps=5, guidance=1.0)
        assert reasons(accel) == (7, {"dense_steps=1": 2})


def test_a_pipeline_made_from_another_keeps_its_steps(wan_pipe):
    first = wan_pipe()
    with dit_accel.accelerate(first, "gna", dense_steps=0.5, **WINDOW) as accel:
        second = WanPipeline.from_pipe(first)
        second.set_progress_bar_config(disable=True)
        del first
        gc.collect()
        generate(second, steps=8, guidance=1.0)
        assert reasons(accel) == (4, {"dense_steps=0.5": 4})


def test_image_to_video_leaves_the_image_attention_alone(wan_pipe, tiny_wan, monkeypatch):
    """Wan 2.1 image to video: cross-attention to text and image is the model's own, self-attention is ours."""
    from diffusers.models.transformers import transformer_wan

    transformer = tiny_wan(in_channels=12, image_dim=10, added_kv_proj_dim=24)
    pipe = wan_pipe(WanImageToVideoPipeline, transformer=transformer, image_encoder=None, image_processor=None)
    lengths, original = [], transformer_wan.dispatch_attention_fn

    def dispatch(query, key, *args, **kwargs):
        lengths.append((query.shape[1], key.shape[1]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", dispatch)
    inputs = {
        "hidden_states": torch.randn(2, 12, 3, 10, 14),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 512, 16),
        "encoder_hidden_states_image": torch.randn(2, 6, 10),
    }
    with dit_accel.accelerate(pipe, "gna", **WINDOW) as accel, torch.no_grad():
        transformer(**inputs)
        assert reasons(accel) == (1, {})
    tokens = 3 * 5 * 7
    assert lengths == [(tokens, 6), (tokens, 512)] * 2


@pytest.mark.parametrize("method", [("gna", {"window": (1, 5, 5)}), ("sla", {"topk": 0.3, "block": 16})])
def test_flux(method, flux_pipe):
    pipe = flux_pipe()
    dense = draw(pipe)
    name, config = method
    with dit_accel.accelerate(pipe, name, dense_steps=1, dense_last_steps=1, **config) as accel:
        sparse = draw(pipe)
        assert reasons(accel) == (2, {"dense_steps=1": 1, "dense_last_steps=1": 1})
        assert list(accel.report().grids) == ["1x11x13 + 5 text first"]
    assert (sparse - dense).abs().max() > 1e-4
    assert torch.equal(draw(pipe), dense)


def test_flux_image_to_image_starts_in_the_middle(flux_pipe):
    pipe = flux_pipe(FluxImg2ImgPipeline)
    image = torch.randn(1, 16, 22, 26)
    pipe.transformer = type(pipe.transformer)(**(dict(pipe.transformer.config) | {"in_channels": 64})).eval()
    pipe.prepare_latents = lambda *args: (
        pipe._pack_latents(image, 1, 16, 22, 26),
        pipe._prepare_latent_image_ids(1, 11, 13, "cpu", torch.float32),
    )
    pipe.image_processor.preprocess = lambda image, **sizes: image
    with dit_accel.accelerate(pipe, "gna", dense_steps=6, window=(1, 5, 5)) as accel:
        draw(pipe, steps=10, image=image, strength=0.6)
        assert reasons(accel) == (4, {"dense_steps=6": 2})


def test_flux_kontext_takes_the_given_image_as_a_frame(flux_pipe):
    pipe = flux_pipe()
    kontext = FluxKontextPipeline(**pipe.components)
    kontext.set_progress_bar_config(disable=True)
    prepare = kontext.prepare_latents

    def with_image(image, *arguments):
        latents, _, ids, _ = prepare(None, *arguments)
        return latents, torch.ones_like(latents), ids, torch.cat((torch.ones(len(ids), 1), ids[:, 1:]), 1)

    kontext.prepare_latents = with_image
    with (
        dit_accel.accelerate(kontext, "tile", references=1),
        pytest.raises(dit_accel.DitAccelError, match=names("2x11x13")),
    ):
        draw(kontext, _auto_resize=False, max_area=176 * 208)
    with dit_accel.accelerate(kontext, "gna", window=(1, 5, 5)) as accel:
        draw(kontext, _auto_resize=False, max_area=176 * 208)
        assert list(accel.report().grids) == ["2x11x13 + 5 text first"]


def test_saved_for_a_pipeline_with_two_transformers(wan_pipe, tiny_wan, tmp_path):
    pipe = wan_pipe(transformer_2=tiny_wan(3), boundary_ratio=0.8)
    with dit_accel.accelerate(pipe, "sla", topk=0.3, block=16) as accel:
        for module in accel.learned_weights().values():
            torch.nn.init.normal_(module.proj.weight)
        wanted = generate(pipe)
        accel.save_pretrained(tmp_path)
    with dit_accel.load(pipe, tmp_path):
        assert torch.equal(generate(pipe), wanted)
    with pytest.raises(dit_accel.DitAccelError, match=names("transformer")):
        dit_accel.load(pipe.transformer, tmp_path)


def test_what_a_transformer_kept_goes_while_the_next_one_runs(wan_pipe, tiny_wan):
    """And all of it with remove(), also after a run that was interrupted."""
    pipe = wan_pipe(transformer_2=tiny_wan(3), boundary_ratio=0.8)
    accel = dit_accel.accelerate(pipe, "gna", window=(2, 3, 4), share="residual", refresh=2)

    def kept():
        return [sum(len(layer.ours.stored) for layer in engine.layers) for engine in accel._engines]

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 5
        return tensors

    generate(pipe, steps=8)
    assert kept() == [0, 0]
    generate(pipe, steps=8, callback_on_step_end=stop)
    assert kept()[1] > 0
    accel.remove()
    assert kept() == [0, 0]
