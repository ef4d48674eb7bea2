"""The portable implementation against the reference in fp64: output, LSE and every gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels.block_sparse import dense, portable
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs, Segments

SLIDING = ("gna", {"window": (2, 3, 4)})
BLOCKED = ("gna", {"window": (2, 4, 4), "stride": (2, 4, 4)})
TILES = {"tile_q": (2, 2, 4), "tile_k": (1, 4, 4)}

# Pairwise over: grid and its length, method or lists per head, text and where it lies, lengths per sample, head size,
# input size, block sizes and tiles that do not divide the grid, queries that are not the keys.
CASES = {
    "one-token": {"shape": (1, 1, 1), "dim": 64, "batch": 2},
    "63-dense-text": {"shape": (1, 7, 9), "dim": 40, "text": 11, "text_lens": [4, 11, 0], "batch": 3, "size": 4.0},
    "64-one-block": {"shape": (1, 8, 8), "dim": 72, "block_q": 64, "block_k": 64},
    "65-ragged": {"shape": (1, 5, 13), "dim": 96, "block_q": 64, "block_k": 32, "size": 16.0},
    "1000-sliding-raster": {
        "shape": (10, 10, 10),
        "method": "gna",
        "config": {"window": (3, 5, 5)},
        "dim": 64,
        "heads": 1,
    },
    "sliding-tiled": dict(shape=(4, 6, 9), method=SLIDING[0], config=SLIDING[1], dim=64, size=4.0, **TILES),
    "sliding-text-first": dict(
        shape=(3, 5, 7),
        method="gna",
        config={"window": (2, 3, 3)},
        text=9,
        text_first=True,
        text_lens=[9, 2],
        batch=2,
        dim=40,
        **TILES,
    ),
    "blocked-tiled": dict(shape=(4, 8, 8), method=BLOCKED[0], config=BLOCKED[1], dim=128, batch=2, **TILES),
    "causal-between": {
        "shape": (4, 4, 6),
        "method": "gna",
        "config": {"window": (3, 3, 3), "causal": True},
        "text": 5,
        "conditioning": 7,
        "between": True,
        "per_sample": True,
        "gap": 3,
        "text_lens": [0, 5, 3],
        "batch": 3,
        "dim": 72,
        "size": 16.0,
    },
    "dilated": dict(
        shape=(4, 8, 9), method="gna", config={"window": (2, 3, 3), "dilation": (1, 2, 3)}, dim=64, **TILES
    ),
    "radial": dict(shape=(6, 4, 5), method="radial", config={"decay": 0.4}, dim=64, text=6, text_lens=[1], **TILES),
    "tile-method": {
        "shape": (4, 5, 5),
        "method": "tile",
        "config": {"references": 1},
        "dim": 96,
        "conditioning": 10,
        "block_k": 8,
    },
    "heads-65": {"shape": (1, 5, 13), "topk": 2, "batch": 2, "heads": 3, "dim": 64, "size": 4.0},
    "heads-text": {
        "shape": (3, 5, 7),
        "topk": 4,
        "text": 9,
        "text_lens": [3, 9],
        "batch": 2,
        "dim": 40,
        "block_q": 32,
        "block_k": 8,
    },
    "heads-tiles-ragged": dict(shape=(3, 5, 7), topk=3, conditioning=5, dim=128, size=16.0, **TILES),
    "queries-longer": {
        "shape": (1, 5, 8),
        "query_grid": (3, 5, 8),
        "dim": 64,
        "batch": 2,
        "text": 7,
        "text_lens": [7, 2],
    },
    "queries-shorter-heads": {
        "shape": (4, 5, 8),
        "query_grid": (1, 1, 33),
        "topk": 3,
        "dim": 72,
        "text": 7,
        "text_lens": [1],
    },
    "scaled": {"shape": (1, 6, 11), "scale": 0.3, "dim": 96, "text": 3, "text_first": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accurate(make_problem, case, dtype):
    make_problem(**case).check("portable", dtype)


@pytest.mark.parametrize("name", ["sliding-tiled", "causal-between", "heads-text"])
def test_same_without_gradient_of_lse(make_problem, name):
    make_problem(**CASES[name]).check("portable", torch.float32, lse_gradient=False)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fp64_equals_the_reference(make_problem, case):
    problem = make_problem(**case)
    got, want = problem.run("portable", torch.float64), problem.run("reference", torch.float64)
    for name, value in want.items():
        size = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=1e-12 * size, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_masks_beyond_the_kept_ones_are_evaluated(make_problem, monkeypatch):
    monkeypatch.setattr("dit_accel.kernels.block_sparse.prepare.MASK_BYTES", 0)
    portable.preparations.entries.clear()
    make_problem(**CASES["sliding-text-first"]).check("portable", torch.float32)
    assert any(batch.evaluate for batch in portable.preparations.entries[-1].batches)
    portable.preparations.entries.clear()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("text", [0, 5])
def test_runs_of_keys_apart(make_problem, monkeypatch, dtype, text):
    """Each run of keys by itself: a row's results are merged several times, and no keys are gathered for that."""
    costs = {"RUN_COST": 0, "VIEW_COST": 0, "PACK_COST": 0, "KEY_COST": 1000}
    for name, value in {**costs, "MASKED_QUERIES": 16, "LONG_RUN": 20, "VECTOR": 4}.items():
        monkeypatch.setattr(f"dit_accel.kernels.block_sparse.grouping.{name}", value)
    portable.preparations.entries.clear()
    band = make_problem((6, 5, 8), "radial", {"decay": 0.5}, text=text, block_q=16, block_k=8)
    band.check("portable", dtype)
    batches = portable.preparations.entries[-1].batches
    assert sum(batch.merged for batch in batches) > 4
    held = torch.zeros(band.q.shape[2], band.q.shape[2], dtype=torch.int64)
    for batch in batches:
        for q, k in zip(batch.q, batch.k, strict=True):
            held[q[:, None], k] += 1 if batch.bias is None else batch.bias.isfinite().long()
        assert not batch.merged or batch.k.shape[1] == 1 or bool((batch.k.diff() == 1).all())
    assert torch.equal(held, band.mask()[0, 0].long())
    portable.preparations.entries.clear()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["causal-between", "blocked-tiled", "heads-text", "queries-longer"])
def test_products_of_other_devices(make_problem, monkeypatch, name, dtype):
    monkeypatch.setattr(dense, "_fused", lambda x: False)
    make_problem(**CASES[name]).check("portable", dtype)


@pytest.mark.parametrize("fused", [True, False])
def test_many_small_chunks(make_problem, monkeypatch, fused):
    monkeypatch.setattr(dense, "_fused", lambda x: fused)
    monkeypatch.setattr(dense, "CPU_LOGITS", 500)
    monkeypatch.setattr(dense, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(portable, "GROUP_BYTES", 1)
    for name in ("causal-between", "blocked-tiled", "heads-text"):
        make_problem(**CASES[name]).check("portable", torch.float32)


@pytest.mark.parametrize("topk", [None, 2], ids=["shared", "per-head"])
def test_poison_is_never_read(make_problem, topk):
    """NaN in text that is not valid and in rows of no segment: neither the output nor a gradient sees it."""
    method = {} if topk else {"method": "gna", "config": {"window": (1, 3, 3)}}
    case = {
        "shape": (2, 4, 5),
        "text": 6,
        "text_lens": [2, 0],
        "batch": 2,
        "per_sample": True,
        "gap": 2,
        "topk": topk,
    } | method
    problem = make_problem(**case)
    clean = problem.run("portable", torch.float32)
    for b, (start, valid) in enumerate(zip(problem.options["text_start"].tolist(), (2, 0), strict=True)):
        for x in (problem.k, problem.v):
            x[b, :, start + valid :] = float("nan")
            x[b, :, : int(problem.options["visual_start"][b])] = float("nan")
    poisoned = problem.run("portable", torch.float32)
    for name, value in clean.items():
        torch.testing.assert_close(poisoned[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("topk", [None, 2], ids=["shared", "per-head"])
def test_queries_that_see_nothing(make_problem, topk):
    problem = make_problem((1, 6, 8), topk=topk, batch=2, text=4, text_lens=[0, 4])
    problem.lists[1][..., 0] = 0  # the first query block lists nothing
    problem.lists[0][..., 1, 0], problem.lists[1][..., 1] = 3, 1  # the second lists the text block alone
    out, lse = problem.call("portable", return_lse=True)
    assert out[:, :, :16].eq(0).all() and lse[:, :, :16].eq(float("-inf")).all()
    assert out[0, :, 16:32].eq(0).all() and lse[0, :, 16:32].eq(float("-inf")).all()
    assert lse[1, :, 16:32].isfinite().all()
    problem.check("portable", torch.float32)


def test_a_masked_row_that_sees_nothing(make_problem):
    """Tables may forbid every pair of a row inside a block in which other rows see something."""
    problem = make_problem((1, 1, 32), "gna", {"window": (1, 1, 4)})
    tables = problem.options["tables"]
    header = tables[1:9].tolist()
    tables[header[3] + 2 * 5 : header[3] + 2 * 5 + 2] = 0  # query 5: keys from 0 to 0
    problem.options["partial"] = None
    out, lse = problem.call("portable", return_lse=True)
    assert out[:, :, 5].eq(0).all() and lse[:, :, 5].eq(float("-inf")).all() and lse[:, :, 4].isfinite().all()
    problem.check("portable", torch.float32)


@pytest.mark.parametrize("name", ["sliding-text-first", "heads-text"])
def test_ten_runs_are_bit_equal(make_problem, name):
    problem = make_problem(**CASES[name])
    first = problem.run("portable", torch.float32)
    for _ in range(9):
        for key, value in problem.run("portable", torch.float32).items():
            assert torch.equal(value, first[key]), key


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("topk", [None, 4], ids=["shared", "per-head"])
def test_memory_grows_with_tokens_not_with_their_square(make_problem, topk):
    method = {} if topk else {"method": "gna", "config": {"window": (2, 8, 16)}}
    tiles = {"tile_q": (2, 4, 8), "tile_k": (2, 4, 8)}
    problem = make_problem((8, 16, 32), heads=1, dim=8, block_q=64, block_k=64, topk=topk, **tiles, **method)
    geometry, tokens = problem.geometry(), problem.q.shape[2]
    call = BlockSparseInputs(
        problem.q, problem.k, problem.v, problem.block_lists(), Segments(), geometry, problem.scale
    )
    with _Largest() as largest:
        out, lse = portable.forward(call)
        portable.backward(problem.grad_out, None, out, lse, call)
    assert largest.elements <= tokens**2 / 8
