"""FlexAttention against the reference in fp64.

Compiled, on a CPU: the output, which is all that PyTorch has there. In full on a GPU. LSE and gradients through our
lists, bits and gathered rows also on a CPU, with FlexAttention written out as its definition.
"""

import dataclasses
import types

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from messages import names
from torch.nn.attention.flex_attention import create_mask

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls, obstacles
from dit_accel.kernels.block_sparse.libraries import flex

TILES = {"tile_q": (2, 2, 4), "tile_k": (1, 4, 4)}
# Pairwise over: raster and tiles, ragged ends, several joined blocks, products and bands, text first, behind and
# between with lengths and rows of their own for each sample, conditioning, lists per head, queries of their own.
CASES = {
    "ragged": {"shape": (1, 5, 40), "dim": 40, "block_q": 64, "block_k": 32},
    "tiles-text-first": {
        "shape": (6, 5, 9),
        "method": "gna",
        "config": {"window": (2, 3, 4)},
        "text": 7,
        "text_first": True,
        "text_lens": [3, 7],
        "batch": 2,
        "size": 4.0,
        **TILES,
    },
    "between": {
        "shape": (4, 5, 7),
        "method": "radial",
        "config": {"decay": 0.4},
        "text": 5,
        "conditioning": 3,
        "between": True,
        "per_sample": True,
        "gap": 2,
        "text_lens": [0, 3],
        "batch": 2,
        "dim": 72,
        "block_k": 128,
    },
    "heads-partial": {
        "shape": (3, 7, 8),
        "method": "gna",
        "config": {"window": (1, 3, 3)},
        "per_head": True,
        "text": 3,
        "dim": 64,
    },
    "queries-longer": {"shape": (1, 9, 16), "query_grid": (2, 9, 16), "topk": 3, "batch": 2, "dim": 64},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("ragged", torch.float32),
        pytest.param("tiles-text-first", torch.bfloat16, marks=pytest.mark.thorough),
        pytest.param("heads-partial", torch.float32, marks=pytest.mark.thorough),
    ],
)
def test_compiled_output(make_problem, case, dtype):
    """Few cases: each is compiled, which takes seconds."""
    problem = make_problem(**CASES[case])
    rounded = dataclasses.replace(problem, **{name: getattr(problem, name).to(dtype) for name in ("q", "k", "v")})
    plain, _ = plain_attention(rounded.q, rounded.k, rounded.v, rounded.mask(), rounded.scale)
    exact = rounded.call("reference", torch.float64)
    assert_accurate("out", rounded.call("flex"), plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_results_are_within_the_budget(make_problem, case):
    make_problem(**CASES[case]).check("flex", torch.bfloat16)


@dataclasses.dataclass
class Definition:
    """What FlexAttention computes, by masked softmax; counts its calls."""

    calls: int = 0

    def __call__(self, q, k, v, *, block_mask, scale, return_aux):
        self.calls += 1
        rows, columns = block_mask.BLOCK_SIZE
        mask = create_mask(block_mask.mask_mod, len(q), q.shape[1], q.shape[2], k.shape[2], device=q.device)

        def spread(blocks):
            return blocks.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., : q.shape[2], : k.shape[2]]

        full = torch.zeros_like(block_mask.to_dense(), dtype=torch.bool)
        for place in torch.cartesian_prod(*map(torch.arange, full.shape[:3])).tolist():
            count, listed = block_mask.full_kv_num_blocks[tuple(place)], block_mask.full_kv_indices[tuple(place)]
            full[(*place, listed[:count].long())] = True
        visited = block_mask.to_dense().bool()
        out, lse = plain_attention(q, k, v, (spread(visited) & mask) | spread(full), scale)
        return out, types.SimpleNamespace(lse=lse)


@pytest.fixture
def definition(monkeypatch):
    key = impls.BLOCK_SPARSE, "flex"
    monkeypatch.setattr(
        impls, "_TABLE", {**impls._TABLE, key: dataclasses.replace(impls._TABLE[key], cannot=obstacles.nothing)}
    )
    written = Definition()
    monkeypatch.setattr(flex, "flex_attention", written)
    monkeypatch.setattr(flex, "_compiled", lambda key: flex._attend)
    monkeypatch.setattr(flex, "NO_LSE", ())
    return written


@pytest.mark.parametrize("case", CASES)
def test_lists_bits_and_rows(make_problem, definition, case):
    make_problem(**CASES[case]).check("flex", torch.float32)
    assert definition.calls == 1


def test_poison_is_never_read(make_problem, definition):
    """NaN in text that is not valid and in rows of no segment."""
    problem = make_problem(**CASES["between"])
    clean = problem.run("flex", torch.float32)
    seen = problem.mask().any(-2)[:, 0]
    for tensor in (problem.k, problem.v):
        tensor.masked_fill_(~seen[:, None, :, None], float("nan"))
    poisoned = problem.run("flex", torch.float32)
    for name, result in clean.items():
        assert torch.equal(result, poisoned[name]), name


@pytest.mark.parametrize("method", ["gna", "tile", "radial"])
def test_packed_lists_give_the_same(definition, method):
    """A plan packs its lists before the first call; without packing, each call reads them anew."""
    config = {"gna": {"window": (3, 3, 4)}, "tile": {"references": 1}, "radial": {"rule": "released", "block": 16}}
    plan = dit_accel.plan(method, dit_accel.TokenGrid(3, 4, 6, text=5), **config[method])
    q, k, v = torch.randn(3, 1, 2, plan.grid.tokens, 16).unbind()
    packed = dit_accel.attention(q, k, v, plan, impl="flex")
    assert plan.lists(q.device, impls.named("flex").packing).packed is not None
    key = impls.BLOCK_SPARSE, "flex"
    impls._TABLE[key] = dataclasses.replace(impls._TABLE[key], packing=None)
    assert torch.equal(packed, dit_accel.attention(q, k, v, plan, impl="flex"))
    torch.testing.assert_close(packed, dit_accel.attention(q, k, v, plan, impl="reference"))


@pytest.mark.gpu
def test_it_compiles_into_its_caller(make_problem):
    problem = make_problem(**CASES["ragged"]).to("cuda")
    impls.named("flex").load()
    compiled = torch.compile(lambda q: problem.call("flex").sin() + q.sum(), fullgraph=True)
    with torch.no_grad():
        got, want = compiled(problem.q), problem.call("reference").sin() + problem.q.sum()
    torch.testing.assert_close(got, want)


def test_what_pytorch_lacks_is_refused(make_problem):
    problem = make_problem(**CASES["ragged"])
    with pytest.raises(DitAccelError, match=names("log-sum-exp", "cpu")):
        problem.call("flex", return_lse=True)
    problem.q.requires_grad_()
    with pytest.raises(DitAccelError, match=names("gradients", "cpu")):
        problem.call("flex")
    with pytest.raises(DitAccelError, match=names(128, 24)):
        make_problem((1, 4, 12), block_q=24).call("flex")
