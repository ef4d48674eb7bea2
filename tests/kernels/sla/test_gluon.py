"""The Gluon forward of SLA against its definition: natively on compute capability 9.0, else under the emulator.

Router, state and backward are Triton's, so that ``TRITON_INTERPRET=1`` must be set before Triton is imported; this file
runs in a process of its own. The interpreter has no bfloat16, so tests of the forward alone make the state in PyTorch.
"""

import dataclasses

import pytest
import torch
from accuracy import assert_accurate
from messages import names
from sla_calls import Case, check, formula, setup, sparse_linear_attention

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls, obstacles
from dit_accel.kernels.cuts import block_means
from dit_accel.kernels.sla.arguments import apply_map
from dit_accel.tokens import TokenGrid

gluon = pytest.importorskip("dit_accel.kernels.sla.gluon")
gluon_forward = pytest.importorskip("dit_accel.kernels.sla.gluon_forward")
triton = pytest.importorskip("dit_accel.kernels.sla.triton")
emulator = pytest.importorskip("emulator")
calls = pytest.importorskip("gluon_calls")
NATIVE, pytestmark = calls.NATIVE, calls.SOMEWHERE
DEVICE = "cuda" if NATIVE else "cpu"
KERNEL = gluon_forward.sparse_linear_gluon_fwd_kernel


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    """Runs "gluon" under the emulator, where no GPU runs it; a test may ask for an order of events."""

    def use(**options):
        monkeypatch.setattr(gluon, "sparse_linear_gluon_fwd_kernel", calls.Emulated(KERNEL, **options))

    if not NATIVE:
        monkeypatch.setattr(gluon.engine, "multiprocessors", lambda _: 2)
        row = impls.named("gluon", impls.SLA)
        key = row.kernel, row.name
        monkeypatch.setitem(impls._TABLE, key, dataclasses.replace(row, cannot=obstacles.nothing))
        use()
    return use


@pytest.fixture
def in_pytorch(monkeypatch):
    """The kernel of the state in PyTorch; tests/kernels/sla/test_triton.py holds them."""

    def state(k, v, order, feature_map):
        phi = apply_map(k.float(), feature_map).to(v.dtype).float()
        return phi.mT @ v.float(), phi.sum(-2), block_means(k, order)

    if not NATIVE:
        monkeypatch.setattr(triton, "state", state)


RASTER = {"topk": 0.4, "block_q": 128}
TILES = RASTER | {"order": "tile"}
ONE = {"batch": 1, "heads": 1, "impl": "gluon"}
CASES = {
    "one-token": Case(TokenGrid(1, 1, 1), RASTER, **ONE),
    "one-block": Case(TokenGrid(1, 8, 16), RASTER, dim=128, **ONE),
    "ragged": Case(TokenGrid(1, 7, 29), RASTER, impl="gluon"),
    "many-steps": Case(TokenGrid(1, 8, 145), RASTER | {"topk": 0.9}, size=4.0, **ONE),
    "tiles": Case(TokenGrid(3, 10, 12), TILES, dim=128, size=4.0, **ONE),
    "tiles-text": Case(TokenGrid(3, 7, 12, text=70, conditioning=66), TILES, text_lens=(3, 70), impl="gluon"),
    "text-first": Case(TokenGrid(1, 10, 15, text=65, text_first=True), RASTER, text_lens=(64,), **ONE),
    "no-valid-text": Case(TokenGrid(1, 10, 15, text=65), RASTER, text_lens=(0,), **ONE),
    "wide-keys": Case(TokenGrid(1, 20, 29), RASTER | {"block": 128}, dim=128, **ONE),
    "elu": Case(TokenGrid(1, 10, 21), RASTER | {"feature_map": "elu"}, size=4.0, **ONE),
    "relu": Case(TokenGrid(1, 10, 21), TILES | {"feature_map": "relu"}, dim=128, **ONE),
    "x16": Case(TokenGrid(1, 10, 21), RASTER, size=16.0, **ONE),
    "scale-given": Case(TokenGrid(1, 10, 21), RASTER, factor=0.3, **ONE),
}


def forward(case, *, training=False):
    """Output by the kernel, by plain PyTorch in its dtype, and by the definition in fp64."""
    module, (q, k, v), lens, hidden = setup(case)
    routing = module.route(q, k, case.grid)
    fixed = {"routing": routing, "grid": case.grid, "config": module.config, "hidden": hidden, "scale": case.factor}
    weights = [module.proj.weight.detach(), module.proj.bias.detach()]
    exact = formula(*(x.double() for x in (q, k, v, *weights)), **fixed)
    plain = formula(q, k, v, *(x.to(case.dtype) for x in weights), **fixed)
    # what must not be read is NaN
    k, v = (x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v))
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    with torch.set_grad_enabled(training):
        out = module.to(DEVICE)(
            q, k, v, grid=case.grid, text_lens=lens if case.text_lens else None, scale=case.factor, impl="gluon"
        )
    visual = slice(case.grid.visual_start, case.grid.visual_start + case.grid.visual)
    return [x.detach().cpu()[:, :, visual] for x in (out, plain, exact)]


@pytest.fixture
def dense_text(monkeypatch):
    """Text and conditioning queries, which `block_sparse` computes, by its portable implementation."""
    from dit_accel.plans import routed

    if not NATIVE:
        attend = routed.attend_blocks
        monkeypatch.setattr(routed, "attend_blocks", lambda *a, **k: attend(*a, **k | {"impl": "portable"}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("in_pytorch", "dense_text")
def test_the_forward_is_within_the_budget(case, dtype):
    if dtype == torch.bfloat16 and not NATIVE and case not in ("ragged", "tiles", "x16"):
        pytest.skip("bfloat16 is emulated on a few cases: the addresses and the order of events are the same")
    out, plain, exact = forward(dataclasses.replace(CASES[case], dtype=dtype))
    assert out.dtype == dtype
    # where plain PyTorch leaves the range of half precision, the band alone counts
    plain = torch.where(plain.isfinite(), plain, exact.to(dtype))
    # both branches are rounded once each
    assert_accurate("out", out, plain, exact, magnitude=2 * exact.abs())


@pytest.mark.usefixtures("in_pytorch", "dense_text")
def test_training_changes_no_bit_of_the_output():
    case = dataclasses.replace(CASES["tiles-text"], dtype=torch.float16)
    assert torch.equal(forward(case)[0], forward(case, training=True)[0])


@pytest.mark.usefixtures("dense_text")
@pytest.mark.parametrize("case", ["one-token", "ragged", "tiles", "elu"])
def test_gradients_come_from_the_triton_backward(case):
    check(dataclasses.replace(CASES[case], dtype=torch.float16))


@pytest.mark.skipif(NATIVE, reason="a GPU has its own order of events")
@pytest.mark.usefixtures("in_pytorch")
def test_every_order_of_events_gives_the_same_bits(emulate):
    case = dataclasses.replace(CASES["many-steps"], dtype=torch.float16)
    want = forward(case)[0]
    for seed, order in enumerate((*emulator.ORDERS, "random")):
        emulate(seed=seed, order=order)
        assert torch.equal(forward(case, training=seed % 2 == 1)[0], want), order


def small(**settings):
    q = torch.zeros(1, 1, 200, settings.pop("dim", 64), dtype=settings.pop("dtype", torch.float16), device=DEVICE)
    weight = torch.zeros(q.shape[-1], q.shape[-1], device=DEVICE)
    return sparse_linear_attention(q, q, q, weight, topk=1, impl="gluon", **{"block_q": 128} | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_q": 64}, "queries keys 128 64"),
        ({"linear_scope": "marginal"}, "linear_scope 'all' 'marginal'"),
        ({"dim": 72}, "head dimensions 64 128 72"),
        ({"dtype": torch.float32}, "float16 bfloat16 float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(monkeypatch, settings, words):
    monkeypatch.undo()
    with pytest.raises(DitAccelError, match=names(words)):
        small(**settings)


@pytest.mark.skipif(NATIVE, reason="here is such a GPU")
def test_other_devices_are_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(DitAccelError, match=r"compute capability 9\.0"):
        small()


@pytest.mark.usefixtures("in_pytorch")
def test_a_scale_that_is_not_above_0_is_refused():
    with pytest.raises(DitAccelError, match=names("scale", -0.5, "impl='triton'")):
        small(scale=-0.5)


def test_auto_does_not_take_it_before_a_measurement():
    assert not impls.named("gluon", impls.SLA).rank
