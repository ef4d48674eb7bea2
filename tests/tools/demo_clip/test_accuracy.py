"""The embedded CLIP tells right captions from wrong ones."""

import torch

from dit_accel.eval.networks import DEMO_CLIP_FOLDER, Clip
from dit_accel.pipelines.demo import clips
from tools.demo_clip import accuracy, frames

HELD_OUT = list(clips.scenes(held_out=True))
LEAST = 0.9  # of all pairs, as the issue asks


class Guess:
    """Random unit vectors in place of a model: tells half of all pairs."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def texts(self, texts):
        vectors = torch.randn(len(texts), 64, generator=self._generator)
        return torch.nn.functional.normalize(vectors, dim=1)

    def images(self, frames):
        return self.texts(frames)


def test_weights_are_small():
    assert sum(path.stat().st_size for path in DEMO_CLIP_FOLDER.iterdir()) <= 4 * 2**20


def test_it_tells_nine_pairs_in_ten_of_held_out_clips():
    clip = Clip.load("demo-clip")
    for name, spoil in accuracy.CONDITIONS.items():
        shares = accuracy.pair_accuracy(clip, HELD_OUT, spoil)
        assert shares["pairs"] > 600
        assert min(shares[key] for key in ("all", *frames.VISIBLE)) >= LEAST, (name, shares)
    unseen = [scene for scene in HELD_OUT if frames.never_shown(scene)]
    assert accuracy.pair_accuracy(clip, unseen, accuracy.CONDITIONS["clean"], seed=1)["all"] >= LEAST


def test_guessing_tells_half():
    """The measure itself: without a model it says so; 641 coins miss 0.5 by 0.08 once in ten thousand."""
    share = accuracy.pair_accuracy(Guess(), HELD_OUT, accuracy.CONDITIONS["clean"], size=(32, 32))["all"]
    assert abs(share - 0.5) < 0.08
