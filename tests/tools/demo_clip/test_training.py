"""The embedded CLIP's data, loss and export."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import CLIPModel

from dit_accel.eval.networks import Clip
from dit_accel.pipelines.demo import clips
from dit_accel.pipelines.demo.clips import Scene
from tools.demo_clip import frames, train


def generator():
    return torch.Generator().manual_seed(0)


def test_training_shows_nothing_that_is_kept_out():
    pool = frames.training_scenes()
    assert not any(scene.held_out for scene in pool)
    kept_out = {frames.triple(scene) for scene in clips.scenes(held_out=True) if frames.never_shown(scene)}
    assert len(kept_out) >= 12  # one combination in five of 81
    assert kept_out.isdisjoint(map(frames.triple, pool))
    batch = train.sample_batch(40, generator())
    assert set(batch) <= set(pool)


def test_batches_hold_the_hard_negatives():
    batch = train.sample_batch(8, generator())
    for first, *others in zip(*[iter(batch)] * 4, strict=True):
        assert [frames.difference(first, other) for other in others] == ["colour", "shape", "background"]


def test_variants_are_all_captions_with_one_visible_error():
    scene = Scene("red", "circle", "left", "black")
    wrong = [frames.difference(scene, other) for other in frames.variants(scene)]
    assert {name: wrong.count(name) for name in frames.VISIBLE} == {"colour": 5, "shape": 2, "background": 4}
    white = Scene("white", "circle", "left", "black")  # cannot be on white
    assert len(frames.variants(white)) == 10 and all(other.direction == "left" for other in frames.variants(white))


def test_blur_spreads_and_keeps_the_sum():
    point = torch.zeros(2, 3, 21, 21)
    point[:, :, 10, 10] = 1
    none, some = frames.blur(point, torch.tensor([0.0, 1.0]))
    assert torch.equal(none, point[0])
    weights = torch.exp(-0.5 * torch.arange(-4.0, 5) ** 2)
    weights /= weights.sum()
    torch.testing.assert_close(some[0, 6:15, 6:15], weights[:, None] * weights)
    torch.testing.assert_close(some.sum((1, 2)), torch.ones(3))


def test_frames_stay_in_range_when_spoilt():
    shown = clips.sample_scenes(6, generator())
    clean = frames.draw(shown, (48, 64), generator())
    spoilt = frames.spoil(clean, generator())
    assert clean.shape == spoilt.shape == (6, 3, 48, 64)
    assert 0 <= clean.min() and clean.max() <= 1 and 0 <= spoilt.min() and spoilt.max() <= 1
    assert (spoilt - clean).abs().mean() > 0.01


def test_loss_is_clips_own_and_equal_scenes_share():
    images, texts = (functional.normalize(torch.randn(3, 8, generator=generator()) + i, dim=1) for i in range(2))
    colours = [Scene(colour, "circle", "left", "black") for colour in ("red", "green", "blue")]
    logits = 7 * images @ texts.T
    labels = torch.arange(3)
    clip_loss = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(train.contrastive(images, texts, colours, torch.tensor(7.0)), clip_loss)

    same = [Scene("red", "circle", way, "black") for way in ("left", "up", "down")]  # one frame does not show the way
    perfect = functional.normalize(torch.ones(3, 8), dim=1)
    loss = train.contrastive(perfect, perfect, same, torch.tensor(7.0))
    assert loss.item() == pytest.approx(math.log(3))


def test_training_learns_and_exports_what_clip_loads(tmp_path, capsys):
    torch.manual_seed(0)
    clip = train.build_clip()
    before = {name: weight.clone() for name, weight in clip.model.state_dict().items()}
    train.train(clip, steps=3, groups=2, rate=1e-3, seed=0, log_every=1)
    assert capsys.readouterr().out.count('"loss"') == 3
    changed = [name for name, weight in clip.model.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(changed) == len([name for name, weight in clip.model.named_parameters()])

    folder = tmp_path / "clips" / "mine"
    for _ in range(2):  # the second time replaces the first
        train.export(clip, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    again = Clip.load(folder)
    assert isinstance(again.model, CLIPModel) and again.name == "mine"
    assert again.processor.to_dict() == clip.processor.to_dict()
    for name, weight in clip.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight.half().float()), name
    assert again.tokenizer("a red zebra").input_ids == clip.tokenizer("a red zebra").input_ids
