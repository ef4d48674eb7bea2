import pytest
import torch
from messages import names

from dit_accel.pipelines.demo import clips


def draw(scene: clips.Scene, seed: int = 0, frames: int = 17, height: int = 64, width: int = 96) -> torch.Tensor:
    return clips.render([scene], frames, height, width, torch.Generator().manual_seed(seed))[0]


def test_one_scene_in_five_is_held_out_and_none_repeats_a_colour():
    held_out, seen = clips.scenes(held_out=True), clips.scenes(held_out=False)
    assert not set(held_out) & set(seen)
    assert 0.15 <= len(held_out) / (len(held_out) + len(seen)) <= 0.25
    assert all(scene.colour != scene.background for scene in (*held_out, *seen))


def test_every_word_is_seen_in_training_and_held_out():
    for pool in (clips.scenes(held_out=True), clips.scenes(held_out=False)):
        assert {scene.colour for scene in pool} == set(clips.COLOURS)
        assert {scene.shape for scene in pool} == set(clips.SHAPES)
        assert {scene.direction for scene in pool} == set(clips.DIRECTIONS)
        assert {scene.background for scene in pool} == set(clips.BACKGROUNDS)


def test_sampling_never_draws_a_held_out_scene():
    drawn = clips.sample_scenes(5000, torch.Generator().manual_seed(0))
    assert not any(scene.held_out for scene in drawn)
    assert len(set(drawn)) == len(clips.scenes(held_out=False))


def test_the_seed_names_the_clip():
    scene = clips.Scene("red", "circle", "right", "blue")
    assert torch.equal(draw(scene, seed=3), draw(scene, seed=3))
    assert not torch.equal(draw(scene, seed=3), draw(scene, seed=4))


@pytest.mark.parametrize(
    "scene", [clips.Scene("red", "circle", "right", "blue"), clips.Scene("white", "square", "up", "black")]
)
def test_pixels_match_the_words(scene):
    video = draw(scene)
    ink, paper = (torch.tensor(clips.PALETTE[name]) * 2 - 1 for name in (scene.colour, scene.background))
    assert video.shape == (3, 17, 64, 96)
    torch.testing.assert_close(video[:, :, 0, 0], paper[:, None].expand(3, 17))
    distance = (video - ink.view(3, 1, 1, 1)).norm(dim=0)
    assert (distance.flatten(1).min(1).values < 1e-5).all(), "every frame shows the object's colour"


@pytest.mark.parametrize("size", [(64, 64), (48, 208), (208, 48), (128, 128)])
@pytest.mark.parametrize("frames", [9, 17])
def test_the_object_stays_inside_the_frame(size, frames):
    generator = torch.Generator().manual_seed(1)
    shown = clips.sample_scenes(16, generator)
    video = clips.render(shown, frames, *size, generator)
    ink = torch.tensor([clips.PALETTE[scene.colour] for scene in shown]) * 2 - 1
    paper = torch.tensor([clips.PALETTE[scene.background] for scene in shown]) * 2 - 1
    covered = ((video - paper.view(-1, 3, 1, 1, 1)).norm(dim=1) / (ink - paper).norm(dim=1).view(-1, 1, 1, 1)).amax(1)
    border = torch.cat([covered[:, 0], covered[:, -1], covered[..., 0], covered[..., -1]], dim=1)
    assert border.max() < 0.5, "the outline lies where half of the edge is covered"


def test_one_frame_is_a_picture():
    assert draw(clips.Scene("red", "circle", "right", "blue"), frames=1).shape == (3, 1, 64, 96)


def test_a_frame_too_small_is_refused():
    with pytest.raises(ValueError, match=names("32 16x96")):
        draw(clips.Scene("red", "circle", "right", "blue"), height=16)
