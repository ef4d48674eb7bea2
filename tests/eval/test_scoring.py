"""From samples to figures."""

import math

import pytest
import torch

from dit_accel.eval import scoring
from dit_accel.eval.metric import ChosenMetric
from dit_accel.eval.metrics.fid import METRIC as FID
from dit_accel.eval.metrics.frame_agreement import METRIC as AGREEMENT
from dit_accel.eval.metrics.kid import METRIC as KID
from dit_accel.eval.metrics.psnr import METRIC as PSNR
from dit_accel.eval.metrics.ssim import METRIC as SSIM
from dit_accel.generation.processes import Process

CPU = torch.device("cpu")


@pytest.fixture
def chosen(pooled):
    declared = ((PSNR, None), (SSIM, None), (FID, pooled), (KID, pooled), (AGREEMENT, pooled))
    return [ChosenMetric(metric.name, metric, network, asked=True) for metric, network in declared]


def scored(chosen, references, others, media=()):
    """Of the reference and of one other method."""
    samples = [("", lambda label, pair=pair: pair[label == "other"]) for pair in zip(references, others, strict=True)]
    return scoring.score(chosen, ["reference", "other"], samples, media, Process(), CPU)


def test_identity_is_perfect_and_noise_is_not(chosen, clips):
    references = clips(4)
    others = [(clip // 2) for clip in references]
    found = scored(chosen, references, others)
    values, figures = found["reference"]
    assert values["psnr"] == [math.inf] * 4
    assert figures["psnr"] == {"value": math.inf, "spread": None, "samples": 4}
    assert figures["ssim"]["value"] == pytest.approx(1)
    assert abs(figures["fid"]["value"]) < 1e-6 < 1e-2 < found["other"][1]["fid"]["value"]
    assert figures["kid"]["value"] <= 0 < found["other"][1]["kid"]["value"]
    assert found["other"][1]["psnr"]["value"] < 20
    assert found["other"][1]["psnr"]["spread"] > 0


def test_too_few_images_have_a_reason(chosen, clips):
    """2 clips of 5 frames are fewer than 12 features and one."""
    figures = scored(chosen, clips(2), clips(2, seed=1))["other"][1]
    assert figures["fid"] == {"value": None, "missing": "needs 13 images in each set, got 10"}
    assert isinstance(figures["kid"]["value"], float)


def test_decibels_are_averaged_as_errors():
    figure = scoring.summary([20.0, 40.0], decibels=True)
    assert figure["value"] == pytest.approx(-10 * math.log10((1e-2 + 1e-4) / 2))
    assert figure["spread"] == pytest.approx(math.sqrt(200))
    assert scoring.summary([math.inf, 20.0], decibels=True) == {
        "value": pytest.approx(20 + 10 * math.log10(2)),
        "spread": None,
        "samples": 2,
    }
    assert scoring.summary([0.25, 0.75], decibels=False)["value"] == 0.5


def test_infinity_in_json():
    assert (scoring.plain(math.inf), scoring.plain(1.5)) == ("inf", 1.5)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_neighbours_and_cover_all(count):
    items = list(range(5))
    parts = [Process(index, count).share(items) for index in range(count)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
