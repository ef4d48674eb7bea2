"""From samples to figures."""

import math

import numpy as np
import pytest
import torch
from messages import names

from dit_accel.eval import scoring
from dit_accel.eval.metric import ChosenMetric, TooFew, known
from dit_accel.generation.processes import ProcessRank

CPU = torch.device("cpu")


@pytest.fixture
def chosen(pooled):
    networks = {"psnr": None, "ssim": None, "fid": pooled, "kid": pooled, "frame_agreement": pooled}
    return [ChosenMetric(name, known()[name], network, named=True) for name, network in networks.items()]


def scored(chosen, baselines, others, media=()):
    """Of the baseline and of one other method, each clip under a prompt of its own."""
    pairs = enumerate(zip(baselines, others, strict=True))
    samples = [(str(number), lambda label, pair=pair: pair[label == "other"]) for number, pair in pairs]
    return scoring.score(chosen, ["baseline", "other"], samples, media, ProcessRank(), CPU)


def test_identity_is_perfect_and_noise_is_not(chosen, clips):
    baselines = clips(4)
    others = [(clip // 2) for clip in baselines]
    scores_of = scored(chosen, baselines, others)
    values, figures = scores_of["baseline"]
    assert values["psnr"] == [math.inf] * 4
    assert figures["psnr"] == {"value": math.inf, "interval": (math.inf, math.inf), "samples": 4}
    assert figures["ssim"]["value"] == pytest.approx(1)
    assert abs(figures["fid"]["value"]) < 1e-6 < 1e-2 < scores_of["other"][1]["fid"]["value"]
    assert figures["kid"]["value"] <= 0 < scores_of["other"][1]["kid"]["value"]
    assert scores_of["other"][1]["psnr"]["value"] < 20
    low, high = scores_of["other"][1]["psnr"]["interval"]
    assert low < scores_of["other"][1]["psnr"]["value"] < high


def test_too_few_images_have_no_figure(chosen, clips):
    """2 clips of 5 frames are fewer than 12 features and one; the evaluation leaves such metrics out."""
    with pytest.raises(TooFew, match=names("13 10")):
        scored(chosen, clips(2), clips(2, seed=1))


def test_decibels_are_averaged_as_errors():
    figure = scoring.average([20.0, 40.0], 2, decibels=True)
    assert figure["value"] == pytest.approx(-10 * math.log10((1e-2 + 1e-4) / 2))
    assert figure["interval"] == pytest.approx((20.0, 40.0))
    assert scoring.average([math.inf, 20.0], 1, decibels=True) == {
        "value": pytest.approx(20 + 10 * math.log10(2)),
        "interval": None,
        "samples": 2,
    }
    assert scoring.average([0.25, 0.75], 2, decibels=False)["value"] == 0.5


class TestBootstrap:
    def test_an_interval_of_a_mean_is_that_of_the_normal_distribution(self):
        values = np.random.default_rng(1).normal(5.0, 2.0, 400)
        low, high = scoring.bootstrap(lambda drawn: drawn.mean((-1, -2)), 400, values)
        half = 1.96 * values.std() / 20
        assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.1 * half)

    def test_samples_of_one_prompt_stay_together(self):
        """Eight equal samples of each prompt are no more than one of each."""
        values = np.random.default_rng(1).normal(size=20)

        def mean(drawn):
            return drawn.mean((-1, -2))

        assert scoring.bootstrap(mean, 20, values.repeat(8)) == pytest.approx(scoring.bootstrap(mean, 20, values))

    def test_chunks_change_nothing(self, monkeypatch):
        values = np.random.default_rng(1).random(30)
        whole = scoring.bootstrap(lambda drawn: drawn.max((-1, -2)), 30, values)
        monkeypatch.setattr(scoring, "CHUNK", 300)
        assert scoring.bootstrap(lambda drawn: drawn.max((-1, -2)), 30, values) == whole

    def test_one_prompt_has_none(self):
        assert scoring.bootstrap(lambda drawn: drawn.mean((-1, -2)), 1, [1.0, 2.0]) is None


def test_infinity_in_json():
    figures = {"psnr": {"value": math.inf, "interval": (20.5, math.inf)}, "kid": {"value": None}}
    assert scoring.plain(figures) == {"psnr": {"value": "inf", "interval": [20.5, "inf"]}, "kid": {"value": None}}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_neighbours_and_cover_all(count):
    items = list(range(5))
    parts = [ProcessRank(index, count).share(items) for index in range(count)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
