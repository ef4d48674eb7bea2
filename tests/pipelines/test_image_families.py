"""What image families do besides the conformance checks: modes they refuse, text masks, masks that are not built."""

import dataclasses
import inspect

import pytest
import tiny_models
import torch
from diffusers import ChromaPipeline, FluxPipeline
from masked_reference import assert_no_worse, plain_and_exact, static_pairs
from messages import names
from tiny_models import run, text_mask
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel.pipelines.family import Memory, ModelInputs
from dit_accel.registry import get_families
from dit_accel.tokens import TokenGrid


def layout(tiny, **changes):
    """What the family reads from the model's call with some arguments changed."""
    transformer = tiny.shared
    call = ModelInputs(inspect.signature(type(transformer).forward), transformer, (), tiny.call() | changes, Memory())
    return get_families()[tiny.family].layout(transformer, call)


@pytest.mark.parametrize("tiny", [tiny for tiny in tiny_models.all_models() if not tiny.video], ids=str)
def test_grid_lengths_and_rows_are_read_from_the_call(tiny):
    call_layout = layout(tiny)
    assert call_layout.grid == tiny.grid
    assert (None if call_layout.text_lens is None else tuple(call_layout.text_lens.tolist())) == tiny.text_lens
    assert call_layout.rows is None if tiny.rows is None else torch.equal(call_layout.rows, tiny.rows)


def latents(*shape):
    return torch.zeros(2, *shape)


class Cache:
    mode = "read"


REFUSED = [
    ("flux", "chroma", {"attention_mask": torch.full((2, 156), 0.5)}, "ones zeros"),
    ("flux", "chroma", {"attention_mask": torch.arange(156).expand(2, -1) < 150}, "masks image tokens"),
    ("flux", "chroma", {"attention_mask": torch.ones(2, 12, dtype=torch.bool)}, "13"),
    ("flux2", "t2i", {"kv_cache_mode": "extract"}, "kv_cache_mode='extract' Flux2KleinPipeline"),
    ("flux3", "t2i", {"img_ids": torch.cartesian_prod(*map(torch.arange, (1, 13, 11, 1)))[:-1]}, "each of the 143"),
    ("qwen_image", "t2i", {"img_shapes": None}, "needs img_shapes"),
    ("qwen_image", "t2i", {"img_shapes": [[(1, 13, 12)]] * 2}, "make 156 image tokens, but the call has 143"),
    ("qwen_image", "t2i", {"img_shapes": [[(1, 13, 11)], [(1, 11, 13)]]}, "images of the same sizes"),
    ("joyimage", "edit-plus", {"shape_list": [[(1, 7, 9)], [(1, 9, 7)]]}, "the same sizes, got shape_list"),
    ("z_image", "t2i", {"x": [[latents(4, 1, 8, 8)]] * 2}, "several images a sample"),
    ("z_image", "t2i", {"x": [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 6)]}, "must have one size"),
    ("cogview", "cogview4", {"attention_mask": torch.full((2, 13), -1.0)}, "adds its attention_mask to the logits"),
    ("glm_image", "t2i", {"kv_caches": [Cache]}, "from a cache"),
    ("kandinsky5", "t2v", {"sparse_params": {}}, "its own sparse attention"),
    ("krea2", "t2i", {"position_ids": torch.zeros(20, 3)}, "position_ids for 13 text and 143 image tokens, got 20"),
    ("ideogram4", "t2i", {"segment_ids": torch.arange(156).expand(2, -1) // 90}, "hold one sample each"),
    ("ideogram4", "t2i", {"indicator": torch.arange(156).expand(2, -1) % 2 + 2}, "indicator segment_ids"),
]


@pytest.mark.parametrize(("family", "id", "changes", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_any_attention(family, id, changes, message):
    tiny = tiny_models.get(family, id)
    with dit_accel.accelerated(tiny.shared, "gna", window=(1, 5, 4)) as accel:
        with pytest.raises(dit_accel.DitAccelError, match=names(message)):
            run(tiny.shared, tiny.call() | changes)
        assert accel.report().sparse_calls == accel.report().dense_calls == 0


def test_layered_images_count_as_frames_and_others_as_conditioning():
    qwen = tiny_models.get("qwen_image", "t2i")
    shapes = [[(1, 5, 7), (2, 5, 7), (1, 4, 7), (1, 5, 7)]] * 2
    call_layout = layout(qwen, img_shapes=shapes, hidden_states=latents(35 + 70 + 28 + 35, 8))
    assert call_layout.grid == TokenGrid(3, 5, 7, text=13, text_first=True, conditioning=63)
    assert "63 tokens" in call_layout.notes[0]


def test_packed_hidream_images_have_their_stated_size():
    hidream = tiny_models.get("hidream", "wide")
    packed = {"hidden_states": latents(169, 16), "hidden_states_masks": latents(169)}
    call_layout = layout(hidream, **packed, img_sizes=torch.tensor([[9, 13], [9, 13]]))
    assert call_layout.grid == hidream.grid
    with pytest.raises(dit_accel.DitAccelError, match=names("size")):
        layout(hidream, **packed, img_sizes=[(9, 13), (13, 9)])


def test_timesteps_that_rise_towards_the_image_are_turned():
    family = get_families()["lumina2"]
    noise = ModelInputs(
        inspect.signature(lambda self, timestep: None), torch.nn.Module(), (torch.tensor([0.25]),), {}, Memory()
    )
    assert family.timestep(noise).item() == 750


class Squares(TorchDispatchMode):
    """Counts tensors of queries x keys that are made."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.made = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-2:] == (self.tokens, self.tokens):
            self.made += result.dtype == torch.bool
        return result


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_chroma_makes_no_mask_of_all_pairs_where_every_layer_is_sparse(dense_layers):
    """A dense layer reads the model's mask, so then it stays."""
    chroma = tiny_models.get("flux", "chroma")
    with dit_accel.accelerated(chroma.shared, "gna", window=(1, 5, 4), dense_layers=dense_layers):
        run(chroma.shared, chroma.call())
        with Squares(chroma.grid.tokens) as squares:
            sparse = run(chroma.shared, chroma.call())
    assert (squares.made > 0) == bool(dense_layers)
    assert torch.equal(run(chroma.shared, chroma.call()), chroma.dense) and not torch.equal(sparse, chroma.dense)


def test_dense_layers_of_chroma_keep_its_mask():
    """All layers dense but the last: the padding changes nothing, as in the stock model."""
    chroma = tiny_models.get("flux", "chroma")
    call = chroma.call()
    noisy = call["encoder_hidden_states"].clone()
    noisy[1, 6:] = 100.0
    with dit_accel.accelerated(chroma.shared, "gna", window=(1, 5, 4), dense_layers=(0, 1, 2)):
        first, second = (
            run(chroma.shared, call | {"encoder_hidden_states": text})
            for text in (call["encoder_hidden_states"], noisy)
        )
    torch.testing.assert_close(first, second)


def test_chroma_runs_through_its_own_pipeline(flux_folder):
    """Prompts of different length, guided; keeping every pair is what the dense model computes."""
    parts = FluxPipeline.from_pretrained(flux_folder).components
    shared = {name: parts[name] for name in ("scheduler", "vae")}
    text = {"text_encoder": parts["text_encoder_2"], "tokenizer": parts["tokenizer_2"]}
    chroma = tiny_models.module("flux").chroma(in_channels=16, joint_attention_dim=16)
    pipe = ChromaPipeline(**shared, **text, transformer=chroma)
    pipe.set_progress_bar_config(disable=True)
    masks = []
    keep = chroma.register_forward_pre_hook(lambda *call: masks.append(call[2]["attention_mask"]), with_kwargs=True)

    def images():
        options = {
            "num_inference_steps": 2,
            "height": 48,
            "width": 64,
            "max_sequence_length": 16,
            "guidance_scale": 3.0,
        }
        generator = torch.Generator().manual_seed(0)
        return pipe(["red", "a blue circle"], negative_prompt=["", "x"], generator=generator, output_type="latent",
                    **options).images  # fmt: skip

    dense = images()
    assert masks[0].dtype == torch.float32 and not masks[0].all()
    keep.remove()
    with dit_accel.accelerated(pipe, "gna", window="full") as accel:
        torch.testing.assert_close(images(), dense)
    report = accel.report()
    assert report.dense_calls == 0 and {layer.sparse_calls for layer in report.layers} == {4}
    with dit_accel.accelerated(pipe, "gna", window=(1, 3, 2), verify="first-call") as accel:
        assert not torch.allclose(images(), dense)
    assert all(0 < layer.kept_mass < 1 for layer in accel.report().layers)


@pytest.mark.parametrize(
    ("family", "id", "name"),
    [
        ("cogview", "cogview4", "attention_mask"),  # which it adds to the logits
        ("flux", "chroma-stock", "attention_mask"),
        ("qwen_image", "t2i", "encoder_hidden_states_mask"),
    ],
)
def test_masks_of_any_pattern(family, id, name):
    """With valid text behind masked text; CogView4 and Chroma weigh it, Qwen-Image masks it."""
    masked = text_mask((13, 6), 13, 2)
    masked[:, 2:4] = 0
    unmasked = tiny_models.get(family, id)
    if id == "chroma-stock":
        masked = torch.cat((masked.float(), torch.ones(2, unmasked.grid.visual)), 1)
    tiny = dataclasses.replace(unmasked, inputs=lambda batch: unmasked.inputs(batch) | {name: masked})
    config = {"window": (1, 5, 4)}
    with dit_accel.accelerated(tiny.shared, "gna", **config):
        sparse = run(tiny.shared, tiny.call())
    plain, exact = plain_and_exact(tiny, static_pairs(dit_accel.plan("gna", tiny.grid, **config).token_mask()))
    assert_no_worse(sparse, plain, exact)
    with dit_accel.accelerated(tiny.shared, "gna", **config):
        assert (run(tiny.shared, unmasked.call()) - plain).abs().max() > 100 * (sparse - plain).abs().max()


def test_attention_of_the_image_alone_has_the_grid_without_text():
    medium = tiny_models.get("sd3", "3.5-medium")
    names = [name for name, _ in get_families()["sd3"].attentions(medium.shared)]
    assert names == [f"transformer_blocks.{block}" for block in ("0.attn", "0.attn2", "1.attn", "1.attn2", "2.attn")]
    assert medium.shared.transformer_blocks[0].attn.processor is medium.shared.transformer_blocks[0].attn2.processor
    with dit_accel.accelerated(medium.shared, "gna", window=(1, 5, 4)) as accel:
        run(medium.shared, medium.call())
    alone = dit_accel.plan("gna", dataclasses.replace(medium.grid, text=0), window=(1, 5, 4)).density
    assert [layer.density == alone for layer in accel.report().layers] == [False, True, False, True, False]
