"""What an evaluation says to use."""

import pytest
from messages import says

from dit_accel.eval import gates
from dit_accel.eval.verdict import decide

PSNR = {"name": "psnr", "title": "PSNR", "unit": "dB", "better": "higher"}
FID = {"name": "fid", "title": "FID", "unit": "", "better": "lower"}


def row(label, speedup, psnr, density=0.5, attention=0.5, loop=None, **others):
    return {
        "label": label,
        "command": f"run {label}",
        "density": density,
        "speedup": speedup,
        "speedup_interval": [speedup - 0.05, speedup + 0.05],
        "attention_speedup": None,
        "loop_seconds": {"p50": loop or 2.0 / speedup, "p95": 9.0},
        "attention_seconds": {"p50": attention, "p95": 9.0},
        "peak_bytes": None,
        "cache": None,
        "figures": {"psnr": {"value": psnr, "interval": [20.0, 30.0]}, "fid": {"value": 40 - float(psnr)}},
        **others,
    }


BASELINE = row("baseline", 1.0, "inf", density=1.0, attention=1.0)
DENSE = row("dense", 1.2, "inf", density=1.0)
CACHED = row("cached", 2.2, 28.0, density=1.0, cache={"name": "mag", "config": {"threshold": 0.12}})
ROWS = [
    BASELINE,
    DENSE,
    row("slow", 1.1, 30.0),
    row("near", 1.4, 29.5),
    row("fast", 1.6, 22.0),
    row("fastest", 2, 15.0),
]


def verdict(rows=ROWS, metrics=(PSNR, FID), require=None):
    return decide(rows, metrics, [] if require is None else gates.parse(require), 2304)


def test_by_default_the_fastest_near_the_best_and_the_best_that_is_fast():
    near, fast = verdict()
    assert (near["row"], near["command"]) == ("near", "run near")
    assert near["text"] == (
        "The fastest within 1 dB of the best: near, 1.40 times as fast (95 %: 1.35 to 1.45), "
        "PSNR 29.50 dB (95 %: 20.0 to 30.0)."
    )
    assert fast["row"] == "fast" and fast["text"].startswith("The best with speedup>=1.5: fast, 1.60 times")


@pytest.mark.parametrize(
    ("require", "chosen"),
    [
        ("psnr>=25", ["near"]),  # of quality: the fastest
        ("speedup>=1.3", ["near"]),  # of speed: the best
        ("fid<=20", ["fast"]),
        ("psnr>=20,speedup>=1.5", ["fast", "fast", "fast"]),
        ("psnr>=20,psnr>=29.6", ["fast", "slow", "slow"]),
    ],
)
def test_under_limits(require, chosen):
    """A line for each limit, and one for all of them."""
    assert [line["row"] for line in verdict(require=require)] == chosen


def test_a_limit_that_nothing_holds():
    (line,) = verdict(require="psnr>=35")
    assert line == {"text": line["text"]}
    assert says(line["text"], "psnr>=35 2.00")


def test_metrics_without_decibels_and_none_at_all():
    (line,) = verdict(metrics=(FID,))
    assert line["row"] == "fast" and "FID 18.00." in line["text"]
    (line,) = verdict(metrics=())
    assert line["row"] == "fastest"


def test_a_step_cache_without_a_sparse_method_counts():
    (line,) = verdict([*ROWS, CACHED], require="speedup>=2")
    assert line["row"] == "cached"


class TestNothingGains:
    """The speed-up may be chance, or its price may be beside the attention."""

    def test_a_longer_video_would(self):
        """Attention takes 0.6 s less and the rest 0.9 s more: from 1.5 times the tokens on."""
        (line,) = verdict([BASELINE, row("gna", 0.87, 25.0, attention=0.4, loop=2.3)])
        assert says(line["text"], "2,304 gna 0.87 0.820 0.920 3,500")

    def test_within_the_noise(self):
        (line,) = verdict([BASELINE, row("gna", 1.04, 25.0, attention=0.9)])
        assert says(line["text"], "noise")

    def test_slower_attention(self):
        (line,) = verdict([BASELINE, row("gna", 0.9, 25.0, attention=1.2, loop=2.2)])
        assert "No setting's attention is faster than dense attention" in line["text"]

    def test_compiled(self):
        rows = [BASELINE | {"attention_seconds": None}, row("gna", 0.9, 25.0) | {"attention_seconds": None}]
        assert says(verdict(rows)[0]["text"], "--compile")

    def test_nothing_sparse(self):
        (line,) = verdict([BASELINE, DENSE])
        assert says(line["text"], "No setting") and "row" not in line

    def test_a_cache_alone_has_no_attention_to_estimate_from(self):
        (line,) = verdict([BASELINE, CACHED | {"speedup": 0.9, "speedup_interval": [0.85, 0.95]}])
        assert says(line["text"], "2,304 cached 0.90") and "row" not in line
