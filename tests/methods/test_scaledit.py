"""Scale-DiT: its mask by brute force, the published counts, anchors in FLUX and Wan, and a LoRA that learns on them."""

import dataclasses

import pytest
import tiny_models
import torch
from accuracy import assert_accurate, plain_attention
from masked_reference import MaskedAttention, assert_no_worse, static_pairs
from messages import names
from tiny_models import run

import dit_accel
from dit_accel.checkpoint import lora as adapters
from dit_accel.errors import DitAccelError
from dit_accel.tokens import TokenGrid
from dit_accel.train.settings import make

IN_MODELS = {"window": 2, "factor": 2}
SMALL = {"window": 4, "factor": 2, "reach": 2}


def seen(height, width, window, factor, reach, sliding, query, key):
    """Whether a token of a frame sees another: ("own", row, column) or ("anchor", row and column at low resolution)."""
    (kind, y, x), (other, v, u) = query, key
    low = factor * max(1, round(height / factor**2))
    if other == "own":
        if sliding:
            return kind == "own" and abs(y - v) <= window // 2 and abs(x - u) <= window // 2
        return kind == "own" and (y // window, x // window) == (v // window, u // window)
    row, column = (y, x) if kind == "anchor" else (y * low // height, x // factor)
    return (row // reach, column // reach) == (v // reach, u // reach)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize(("shape", "window", "factor", "reach"), [((1, 9, 14), 4, 2, 4), ((2, 11, 6), 5, 3, 3)])
def test_the_mask_is_that_of_the_definition(shape, window, factor, reach, sliding):
    frames, height, width = shape
    settings = {"window": window, "factor": factor, "reach": reach, "sliding": sliding}
    plan = dit_accel.plan("scaledit", TokenGrid(*shape, text=3), **settings)
    low = factor * max(1, round(height / factor**2))
    tokens = [("own", y, x) for y in range(height) for x in range(width)]
    tokens += [
        ("anchor", row * factor + cell % factor, cell // factor)
        for row in range(low // factor)
        for cell in range(width)
    ]
    assert sorted(token[1:] for token in tokens if token[0] == "anchor") == [
        (y, x) for y in range(low) for x in range(width // factor)
    ]
    frame = torch.tensor(
        [[seen(height, width, window, factor, reach, sliding, query, key) for key in tokens] for query in tokens]
    )
    visual = frame.repeat(frames, frames)
    mask = plan.token_mask()
    assert torch.equal(mask[plan.grid.visual_rows, plan.grid.visual_rows], visual)
    assert mask[-3:].all() and mask[:, -3:].all()
    assert plan.pairs == mask.sum()


@pytest.mark.parametrize(
    ("side", "sliding", "published"),
    [
        (64, False, 6_750_208),
        (128, False, 26_214_400),
        (256, False, 104_071_168),
        (512, False, 415_498_240),
        (64, True, 6_733_888),
        (128, True, 26_446_912),
        (256, True, 105_612_352),
        (512, True, 422_900_800),
    ],
)
def test_published_counts(side, sliding, published):
    """Those of the code, whose text does not see the anchors."""
    plan = dit_accel.plan("scaledit", TokenGrid(1, side, side, text=512, text_first=True), sliding=sliding)
    anchors = side**2 // 16
    assert plan.grid.tokens == 512 + side**2 + anchors
    assert plan.pairs - 512 * anchors == published


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_attention_is_softmax_over_the_mask(impl):
    torch.manual_seed(0)
    plan = dit_accel.plan("scaledit", TokenGrid(2, 9, 14, text=5), **SMALL)
    q, k, v = (torch.randn(2, 3, plan.grid.tokens, 24) for _ in range(3))
    exact, _ = plain_attention(q.double(), k.double(), v.double(), plan.token_mask(), 24**-0.5)
    plain, _ = plain_attention(q, k, v, plan.token_mask(), 24**-0.5)
    assert_accurate("out", dit_accel.attention(q, k, v, plan, impl=impl), plain, exact)


def test_an_anchor_is_the_mean_of_what_it_stands_for_and_takes_its_position():
    plan = dit_accel.plan("scaledit", TokenGrid(1, 8, 6), window=4, factor=2)
    latent = torch.randn(2, 3, 1, 16, 12)  # patches of 2 x 2
    longer = plan.extend(latent)
    assert torch.equal(longer[..., :16, :], latent) and longer.shape[-2] == 2 * plan.grid.height == 20
    for index, place in enumerate(plan.places.tolist()):
        row, column = divmod(index, 6)
        y, x = divmod(place, 6)
        anchor = longer[..., 16 + 2 * row : 18 + 2 * row, 2 * column : 2 * column + 2]
        stands_for = latent[..., 2 * y : 2 * y + 4, 2 * x : 2 * x + 4]
        torch.testing.assert_close(anchor, stands_for.unfold(-2, 2, 2).unfold(-2, 2, 2).mean((-2, -1)))


FLUX, WAN = tiny_models.get("flux", "t2i"), tiny_models.get("wan", "t2v")


def flux_call(dtype=torch.float32):
    return tiny_models.cast(tiny_models.module("flux").inputs((8, 6)), dtype)


def with_anchors(call):
    """A call of FLUX with 8 x 6 tokens, and 4 x 3 anchors in two rows: those of factor 2, written out."""
    packed = call["hidden_states"].reshape(-1, 4, 2, 3, 2, 2, 4)  # sample, Y, i, X, j, channel, latents of a token
    anchors = packed.mean(-1).permute(0, 1, 3, 5, 2, 4).reshape(-1, 4, 3, 8)  # a token's mean is a latent
    cells = [(2 * row + column % 2, column // 2) for row in range(2) for column in range(6)]
    more = torch.stack([anchors[:, row, column] for row, column in cells], 1)
    ids = torch.tensor([[0, 2 * row, 2 * column] for row, column in cells]).to(call["img_ids"])
    return call | {
        "hidden_states": torch.cat((call["hidden_states"], more), 1),
        "img_ids": torch.cat((call["img_ids"], ids)),
    }


def test_flux_attends_over_its_tokens_and_the_anchors():
    plan = dit_accel.plan("scaledit", TokenGrid(1, 8, 6, text=13, text_first=True), **SMALL)
    with dit_accel.accelerated(FLUX.shared, "scaledit", **SMALL) as accel:
        sparse = run(FLUX.shared, flux_call())
    assert accel.report().grids == {"1x8x6 + 13 text first": plan.density} and plan.density < 0.7
    tiny, results = dataclasses.replace(FLUX, grid=plan.grid), []
    for model, dtype in ((FLUX.shared, torch.float32), (FLUX.shared_double, torch.float64)):
        with MaskedAttention(tiny, static_pairs(plan.token_mask()), double=dtype == torch.float64) as mode:
            out = run(model, with_anchors(flux_call(dtype))).reshape(2, plan.grid.visual, 8)
        assert mode.calls == 4
        results.append(out[:, :48].flatten())
    assert_no_worse(sparse, *results)


def test_wan_attends_over_its_tokens_and_the_anchors(monkeypatch):
    """The model gets the longer latent and positions by hand."""
    settings = {"window": 4, "factor": 3, "reach": 3}
    plan = dit_accel.plan("scaledit", TokenGrid(3, 7, 6), **settings)
    call = tiny_models.module("wan").inputs(3, 14, 12)
    with dit_accel.accelerated(WAN.shared, "scaledit", **settings, verify="first-call") as accel:
        with torch.no_grad():
            sparse = WAN.shared(**call).sample
    assert accel.report().sparse_calls == len(accel.report().layers) and sparse.shape[-2:] == (14, 12)
    results = []
    for model, dtype in ((WAN.shared, torch.float32), (WAN.shared_double, torch.float64)):
        arguments = tiny_models.cast(call, dtype)
        tables = [table.unflatten(1, (3, 7, 6)) for table in model.rope(arguments["hidden_states"])]
        more = [table.flatten(2, 3)[:, :, plan.places].unflatten(2, (-1, 6)) for table in tables]
        longer = tuple(torch.cat(both, 2).flatten(1, 3) for both in zip(tables, more, strict=True))
        monkeypatch.setattr(model.rope, "forward", lambda latent, longer=longer: longer)
        tiny = dataclasses.replace(WAN, grid=plan.grid)
        with MaskedAttention(tiny, static_pairs(plan.token_mask()), double=dtype == torch.float64) as mode:
            out = model(**arguments | {"hidden_states": plan.extend(arguments["hidden_states"])}).sample
        assert mode.calls == len(accel.report().layers)
        results.append(out[..., :14, :].detach())
    monkeypatch.undo()
    assert_no_worse(sparse, *results)


@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=str)
def test_without_anchors_it_is_the_window_method_and_removal_restores_the_model(tiny):
    grid, window = dataclasses.replace(tiny.grid, height=8, width=12), 4
    q, k, v = (torch.randn(1, 2, grid.tokens, 16) for _ in range(3))
    windows = dit_accel.plan("gna", grid, window=("full", window, window), stride=(1, window, window))
    off = dit_accel.plan("scaledit", grid, window=window, factor=0)
    assert torch.equal(dit_accel.attention(q, k, v, off), dit_accel.attention(q, k, v, windows))
    hooks = len(tiny.shared._forward_hooks)
    factor = 11 if tiny is FLUX else 3
    settings = {"window": 4, "factor": factor, "reach": factor}
    with dit_accel.accelerated(tiny.shared, "scaledit", **settings) as accel:
        sparse = run(tiny.shared, tiny.call())
        with accel.paused():
            assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)
    assert sparse.shape == tiny.dense.shape and not torch.equal(sparse, tiny.dense)
    assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense) and len(tiny.shared._forward_hooks) == hooks
    with dit_accel.accelerated(tiny.shared, "scaledit", **settings, dense_steps=1.0):
        assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)


def test_a_lora_learns_on_anchors():
    model = FLUX.build()
    call, wanted = flux_call(), run(FLUX.shared, flux_call())
    accel = dit_accel.accelerate(model, "scaledit", **SMALL)
    adapters.add_lora(model, [f"transformer_blocks.{i}.attn.to_{part}" for i in range(2) for part in "qkv"], 4, 4)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.Adam(weights, lr=0.03), []
    for _ in range(25):
        loss = (model(**call, return_dict=False)[0].flatten() - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses[-5:]) < losses[0] / 2
    assert accel.report().dense_calls == 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (("flux", "kontext"), {"factor": 3, "reach": 3}, "conditioning tokens"),
        (("flux", "chroma"), {"factor": 11, "reach": 11}, "masked text"),
        (("flux", "t2i"), {}, "width 4"),
        (("wan", "vace"), {"factor": 1}, "WanTransformer3DModel"),
        (("qwen_image", "t2i"), {}, "flux flux2 wan qwen_image"),
    ],
)
def test_what_takes_no_anchors_is_refused(name, settings, message):
    tiny = tiny_models.get(*name)
    with pytest.raises(DitAccelError, match=names(message)):
        with dit_accel.accelerated(tiny.shared, "scaledit", window=4, **settings):
            run(tiny.shared, tiny.call())
    assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(DitAccelError, match=names("reach", "factor=3", 16)):
        dit_accel.plan("scaledit", TokenGrid(1, 9, 9), factor=3)
    with pytest.raises(DitAccelError, match="adds anchors"):
        make({"method": "scaledit", "objectives": {"attention": 1.0}})
