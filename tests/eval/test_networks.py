"""Loading a CLIP folder, preparing frames as transformers does, and what the towers give."""

import json
import shutil

import pytest
import torch
from messages import names
from transformers import UMT5Config

from dit_accel.errors import DitAccelError
from dit_accel.eval.networks import Clip


def test_towers_of_a_folder(clip_folder):
    clip = Clip.load(clip_folder)
    frames = torch.rand(70, 3, 40, 56, generator=torch.Generator().manual_seed(0))  # more than one batch
    images, texts = (
        clip.images(frames),
        clip.texts(["a red circle", "a " * 50]),
    )  # the second is longer than the context
    assert clip.name == "tiny-clip" and images.shape == (70, 12) and texts.shape == (2, 12)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(70))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    assert clip.features(frames).shape == (70, 24)
    layers = clip.layers(frames[:2])
    assert [tuple(layer.shape) for layer in layers] == [(2, 24, 4, 4)] * 3
    hidden = clip.model.vision_model(pixel_values=clip.prepare(frames[:2]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(layers[1][0, :, 2, 3], hidden[2][0, 1 + 2 * 4 + 3])  # row 2, column 3, behind the class

    pixels = clip.prepare(frames[:3])
    torch.testing.assert_close(
        clip.images(frames[:3]) @ clip.texts(["a red circle"]).T * clip.model.logit_scale.exp(),
        clip.model(pixel_values=pixels, **clip.tokenizer(["a red circle"], return_tensors="pt")).logits_per_image,
    )


@pytest.mark.parametrize("size", [(48, 64), (32, 32), (64, 32), (20, 30)], ids=str)
def test_frames_are_prepared_as_transformers_does(clip_folder, size):
    """Against its own processor on Pillow, which works in 8 bits.

    Pillow rounds after each of its two passes, and the second adds up what the first rounded with weights whose sizes
    sum up to 1.3: (1 + 1.3) / 2 levels. Middle tones, because it would also cut off what overshoots between the passes.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    frame = torch.randint(64, 192, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    original = json.loads((clip_folder / "preprocessor_config.json").read_text())
    theirs = CLIPImageProcessorPil(**original)(frame.permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values
    ours = Clip.load(clip_folder).prepare(frame[None] / 255)
    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    levels = 255 * (ours - theirs) * torch.tensor(original["image_std"]).view(3, 1, 1)
    assert levels.abs().max() <= 1.2


def test_both_sides_can_be_given(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    settings = {"size": {"height": 16, "width": 16}, "do_center_crop": False, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.25] * 3}))
    prepare = Clip.load(folder).prepare
    torch.testing.assert_close(prepare(torch.full((2, 3, 40, 60), 0.75)), torch.ones(2, 3, 16, 16))


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise OSError

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", failing)
    with pytest.raises(DitAccelError, match=names("CLIP OSError")):
        Clip.load(tmp_path)


def test_what_is_no_clip_is_refused(clip_folder, tmp_path):
    with pytest.raises(DitAccelError, match=names("CLIP nowhere/at-all")):
        Clip.load("nowhere/at-all")
    UMT5Config().save_pretrained(tmp_path / "other")
    with pytest.raises(DitAccelError, match=names("umt5 clip")):
        Clip.load(tmp_path / "other")
    with pytest.raises(ValueError, match=names("32")):
        Clip.load(clip_folder).images(torch.zeros(3, 32, 32))
