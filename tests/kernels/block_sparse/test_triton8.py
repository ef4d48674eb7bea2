"""`triton8` against its computation in PyTorch and against fp64, on a GPU or under Triton's interpreter."""

import dataclasses
import importlib.util
import math
import os

import eight_bits
import pytest
import torch

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not NATIVE, reason="needs TRITON_INTERPRET=1 or a CUDA device"),
]
DTYPES = [torch.float16, *([torch.bfloat16] if NATIVE else [])]
BLOCKS = {"block_q": 32, "block_k": 32}
TILES = {"tile_q": (1, 8, 4), "tile_k": (1, 4, 8)}
# Static lists with partial blocks in tiles; a raster with a ragged end, text, lengths and starts by sample; lists per
# head; key blocks of 128 in two steps, a negative scale, a head dimension that is padded.
CASES = {
    "tiles": dict(shape=(1, 6, 9), method="gna", config={"window": (1, 3, 4)}, heads=1, dim=64, **BLOCKS, **TILES),
    "raster-text": {
        "shape": (1, 5, 9),
        "method": "gna",
        "config": {"window": (1, 3, 3)},
        "text": 5,
        "conditioning": 3,
        "between": True,
        "per_sample": True,
        "gap": 2,
        "text_lens": [0, 3],
        "batch": 2,
        "heads": 1,
        "dim": 40,
        **BLOCKS,
    },
    "routed": {"shape": (1, 5, 13), "topk": 2, "text": 9, "text_lens": [4], "heads": 2, "dim": 64, **BLOCKS},
    "128-keys": {"shape": (1, 7, 20), "heads": 1, "dim": 72, "block_q": 64, "block_k": 128, "scale": -0.2},
}


def with_outliers(problem, dtype):
    """Keys whose magnitude lies in a few channels, nearly the same in all tokens; values of unequal channels."""
    dim = problem.k.shape[-1]
    offset = torch.zeros(dim)
    offset[::16] = 40.0
    sizes = torch.logspace(-3, 3, dim)
    parts = {"q": problem.q, "k": problem.k + offset, "v": problem.v * sizes}
    return dataclasses.replace(problem, **{name: x.to(dtype) for name, x in parts.items()})


@pytest.fixture
def computed(monkeypatch):
    """Computes a problem: output and LSE in fp64, and what the keys and values were quantised to."""
    from dit_accel.kernels.block_sparse import triton8

    quantised, quantise = [], triton8.quantise
    monkeypatch.setattr(triton8, "quantise", lambda *tensors: quantised.append(quantise(*tensors)) or quantised[-1])

    def compute(problem):
        here = problem.to("cuda") if NATIVE else problem
        out, lse = here.call("triton8", return_lse=True)
        return out.cpu().double(), lse.cpu().double(), *(x.cpu() for x in quantised[-1])

    return compute


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_its_own_computation_and_near_the_exact_one(make_problem, computed, case, dtype):
    problem = with_outliers(make_problem(**CASES[case]), dtype)
    for b, h, sample in eight_bits.samples(problem):  # rows that are no key are not read
        for x in (problem.k, problem.v):
            x[b, h] = torch.full_like(x[b, h], math.nan).index_copy(0, sample.columns, x[b, h][sample.columns])
    out, lse, k8, v16, _, scales = computed(problem)
    exact, _ = problem.call("reference", torch.float64, return_lse=True)
    for b, h, sample in eight_bits.samples(problem, scales[:, 0]):
        i, dim, unit = b * problem.q.shape[1] + h, problem.q.shape[-1], torch.finfo(dtype).eps / 2
        assert ((sample.mean - sample.k.mean(0)).abs() <= len(sample.k) * 2**-24 * sample.k.abs().mean(0)).all()
        assert torch.equal(k8[i, sample.columns, :dim].double(), sample.integers()[1])
        # factors are powers of two: only what falls below fp16's numbers is rounded
        v = v16[i, sample.columns, :dim].double()
        assert (2**4 <= v.abs().amax(0)).all() and (v.abs() < 2**5).all()
        down = scales[i, 2, :dim].double()
        assert ((v * down - sample.v).abs() <= 2.0**-25 * down).all()

        got, got_lse, true = out[b, h][sample.rows], lse[b, h][sample.rows], exact[b, h][sample.rows]
        scale = abs(problem.scale)
        want, want_lse, magnitudes = eight_bits.quantised_attention(sample, scale)
        fp16 = eight_bits.fp16_error(sample, magnitudes)
        assert ((got - want).abs() <= fp16 + unit * want.abs()).all()
        assert torch.equal(got_lse == -math.inf, want_lse == -math.inf)
        # fp32: a sum over channels of the query times the mean key, whose terms cancel
        sizes = (sample.q.abs() @ sample.mean.abs()).double() * scale + want_lse.abs()
        seen = want_lse > -math.inf
        assert ((got_lse - want_lse).abs()[seen] <= 2**-20 * (1 + sizes)[seen]).all()
        first, second = eight_bits.rounding_deviation(sample, scale)
        assert ((got - true).abs() <= eight_bits.SIGMAS * first + second + fp16 + unit * true.abs()).all()


def test_ten_runs_are_bit_equal(make_problem, computed):
    problem = with_outliers(make_problem(shape=(1, 4, 12), topk=1, heads=1, dim=32, **BLOCKS), torch.float16)
    first = computed(problem)[:2]
    for _ in range(9 if NATIVE else 1):
        assert all(map(torch.equal, computed(problem)[:2], first))


def test_what_is_not_finite_shows(make_problem, computed):
    """8 bits would hide it."""
    problem = make_problem(shape=(1, 4, 8), heads=2, dim=32, **BLOCKS)
    problem = with_outliers(problem, torch.float16)
    problem.k[0, 1, 5, 3] = float("nan")
    problem.q[0, 0, 7, 2] = float("inf")
    out, lse, *_ = computed(problem)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert out[0, 0, 7].isnan().all() and out[0, 0, :7].isfinite().all()


def test_the_smallest_numbers_are_no_nan(make_problem, computed):
    """All logits are nearly 0, and of masked pairs -inf."""
    problem = make_problem(**CASES["tiles"])
    problem.options["scale"] = 1e-30
    tiny = {"q": 2.0**-24 * problem.q.sign(), "k": 2.0**-24 * problem.k.round(), "v": problem.v}
    problem = dataclasses.replace(problem, **{name: x.half() for name, x in tiny.items()})
    out, lse, *_ = computed(problem)
    exact, exact_lse = problem.call("reference", torch.float64, return_lse=True)
    assert (out - exact).abs().max() <= 2**-9 * problem.v.abs().max()
    assert (lse - exact_lse).abs().max() <= 2**-20


def test_gradients_and_fp32_are_refused():
    plan = dit_accel.plan("gna", dit_accel.TokenGrid(1, 4, 8), window=(1, 3, 3))
    q = torch.zeros(1, 1, 32, 32, dtype=torch.float16, requires_grad=True, device="cuda" if NATIVE else "cpu")
    with pytest.raises(DitAccelError, match="no gradients"):
        dit_accel.attention(q, q, q, plan, impl="triton8")
    with pytest.raises(DitAccelError, match="not float32"):
        dit_accel.attention(*[q.detach().float()] * 3, plan, impl="triton8")
    assert "triton8" not in {row.name for row in impls.ranked("cuda")}
