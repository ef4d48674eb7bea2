"""proxy: the fine branch alone at the start, both branches against their definition, learned weights kept and saved."""

import math

import pytest
import torch
from accuracy import assert_accurate, error_budget, plain_attention
from messages import names
from roundings import assert_masked

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.methods.proxy import Config, HiddenGate, ProxyGate
from dit_accel.tokens import TokenGrid

# ragged tiles on each axis, a ragged run at the end
IN_MODELS = {"topk": 0.3, "block": 16}
VIDEO = TokenGrid(3, 5, 7)
TEXT = TokenGrid(3, 5, 7, text=9, conditioning=4)
FIRST = TokenGrid(2, 6, 9, text=11, text_first=True)
SETTINGS = {
    "vsa": {"topk": 0.3, "block": 8},
    "windows": {"topk": 0.0, "block": 12, "query": "token"},
    "raster": {"topk": 0.2, "block": 8, "order": "raster"},
    "hilbert": {"topk": 0.2, "block": 8, "order": "hilbert", "query": "token"},
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)


def inputs(grid, dim=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, grid.tokens, 3, dim, generator=generator).transpose(1, 2) for _ in range(4)]


def trained(heads=3, dim=24):
    gate, generator = ProxyGate(dim, heads), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in gate.parameters():
            weight.normal_(std=dim**-0.5, generator=generator)
    return gate


def own_blocks(plan):
    """Whether a visual token is in a block: [blocks, visual], and the mask of all pairs of one block."""
    members = torch.nn.functional.one_hot(plan.block_of(plan.key_order)).T.double()
    return members, (members.T @ members).bool()


@each_setting
@pytest.mark.parametrize("grid", [VIDEO, TEXT, FIRST], ids=str)
def test_an_untrained_gate_leaves_the_bits_of_the_sparse_method(config, grid):
    """Those of sparge by number, or of attention inside the blocks."""
    *tensors, upstream = inputs(grid)
    plan, lens = dit_accel.plan("proxy", grid, **config), torch.tensor([2, grid.text]) if grid.text else None
    output = plan.attend(*tensors, text_lens=lens, module=ProxyGate(24, 3))
    assert torch.equal(output, plan.attend(*tensors, text_lens=lens))
    if config["topk"]:
        alike = {"topk": config["topk"], "topp": 0.0, "order": plan.config.order, "block_q": config["block"]}
        sparge = dit_accel.plan("sparge", grid, block=config["block"], **alike)
        assert torch.equal(output, sparge.attend(*tensors, text_lens=lens)) and plan.pairs == sparge.pairs
        return
    mask = torch.ones(2, 3, grid.tokens, grid.tokens, dtype=torch.bool)
    mask[:, :, grid.visual_rows, grid.visual_rows] = own_blocks(plan)[1]
    assert_masked(plan.attend, tensors, upstream, mask)


@each_setting
@pytest.mark.parametrize("grid", [VIDEO, TEXT, FIRST], ids=str)
def test_the_gated_branch_is_that_of_its_definition(config, grid):
    """Token by token in fp64, from the mean of each block; its gradients are checked in `train/test_gradients`."""
    q, k, v, _ = inputs(grid)
    plan, module = dit_accel.plan("proxy", grid, **config), trained()
    members, _ = own_blocks(plan)
    lists = plan.route(q, k)
    listed = torch.zeros(2, 3, len(members), len(members), dtype=torch.bool).scatter(-1, lists.indices.long(), True)
    block = plan.block_of(plan.key_order)
    mask = torch.ones(2, 3, grid.tokens, grid.tokens, dtype=torch.bool)
    mask[:, :, grid.visual_rows, grid.visual_rows] = listed[:, :, block][..., block]

    def by_definition(q, k, v, weight, bias):
        out, at = plain_attention(q, k, v, mask, 24**-0.5)[0], grid.visual_rows
        sizes = members.sum(-1).to(q)
        means = [(members.to(x) / sizes[:, None]) @ x[:, :, at] for x in (q, k, v)]
        asking = means[0][:, :, block] if plan.config.query == "block" else q[:, :, at]
        coarse = (asking @ means[1].mT * 24**-0.5 + sizes.log()).softmax(-1) @ means[2]
        gated = (q[:, :, at] @ weight.mT + bias[:, None]) * coarse
        return torch.cat([out[:, :, : at.start], out[:, :, at] + gated, out[:, :, at.stop :]], 2)

    weights = [weight.detach() for weight in module.parameters()]
    exact = by_definition(*(x.double() for x in (q, k, v, *weights)))
    for impl in ("portable", "reference"):
        output = plan.attend(q, k, v, module=module, impl=impl)
        assert_accurate(impl, output, by_definition(q, k, v, *weights), exact)
    assert (exact - plan.attend(q, k, v).double()).abs().max() > 0.1  # the branch is seen
    wide = plan.attend(*(x.double() for x in (q, k, v)), module=module.double(), impl="reference")
    torch.testing.assert_close(wide, exact, rtol=1e-12, atol=1e-12)


def test_equal_values_are_kept_by_the_coarse_branch():
    """Softmax weights sum to 1, and a block counts as often as it has tokens: a constant logit gives their mean."""
    q, k, v, _ = (x.double() for x in inputs(VIDEO))
    plan = dit_accel.plan("proxy", VIDEO, block=8)
    mean = v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(plan.coarse(0 * q, k, v, None), mean, rtol=1e-12, atol=1e-12)


def test_processes_that_share_a_sequence_take_the_gates_of_their_heads():
    q, k, v, _ = inputs(VIDEO)
    plan, module = dit_accel.plan("proxy", VIDEO, block=8), trained()
    whole = plan.attend(q, k, v, module=module)
    parts = [
        plan.attend(q[:, at], k[:, at], v[:, at], module=module, heads=(at.start, 3))
        for at in (slice(0, 1), slice(1, 3))
    ]
    exact = plan.attend(*(x.double() for x in (q, k, v)), module=trained().double())
    error = (torch.cat(parts, 1).double() - exact).abs().max().item()
    assert error <= error_budget(whole, exact)


def test_trained_gates_are_saved_loaded_and_compiled(tiny_wan, wan_inputs, tmp_path):
    model, inputs = tiny_wan(), wan_inputs()
    with dit_accel.accelerated(model, "proxy", block=16) as accel, torch.no_grad():
        for seed, module in enumerate(accel.learned_weights().values()):
            for weight in module.parameters():
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
        eager = model(**inputs, return_dict=False)[0]
        compiled = torch.compile(model, backend="eager", fullgraph=True)(**inputs, return_dict=False)[0]
        torch.testing.assert_close(compiled, eager)
        accel.save_pretrained(tmp_path)
    torch._dynamo.reset()
    loaded = dit_accel.load(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], eager)
    loaded.remove()
    assert not any("proxy_gate" in name for name in model.state_dict())


def test_another_module_is_refused():
    q, k, v, _ = inputs(VIDEO)
    with pytest.raises(DitAccelError, match=names("ProxyGate", "Linear")):
        dit_accel.plan("proxy", VIDEO, block=8).attend(q, k, v, module=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.75])
def test_rounding_up_is_that_of_vsa(sparsity):
    """FastVideo's own formula, whose binary error it shares at no number of blocks up to the largest videos'."""
    up = Config(topk=round(1 - sparsity, 6), rounding="up")
    for blocks in range(1, 5000):
        assert up.count(blocks) == min(max(math.ceil((1 - sparsity) * blocks), 1), blocks)


def test_a_tile_is_the_one_asked_for():
    plan = dit_accel.plan("proxy", TokenGrid(21, 30, 52), tile=(4, 4, 4), topk=0.2, rounding="up")
    assert plan.key_order.tile == plan.query_order.tile == (4, 4, 4) and plan.key_order.visual_blocks == 624
    assert plan.config.count(624) == 125 and dit_accel.plan("proxy", TokenGrid(21, 30, 52)).key_order.tile == (2, 8, 4)
    for wrong in ({"block": 32}, {"order": "raster"}):
        with pytest.raises(DitAccelError, match=names("4x4x4", "order=tile", "block=64")):
            dit_accel.plan("proxy", VIDEO, tile=(4, 4, 4), **wrong)


def test_a_coarse_softmax_that_weighs_blocks():
    """A constant logit gives the mean over the blocks' means, however many tokens each has."""
    q, k, v, _ = (x.double() for x in inputs(VIDEO))
    plan = dit_accel.plan("proxy", VIDEO, block=8, weigh="blocks")
    members, _ = own_blocks(plan)
    means = (members / members.sum(-1, keepdim=True)) @ v
    wanted = means.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(plan.coarse(0 * q, k, v, None), wanted, rtol=1e-12, atol=1e-12)


def test_a_gate_of_hidden_states_needs_a_layer():
    q, k, v, _ = inputs(VIDEO)
    with pytest.raises(DitAccelError, match=names("model")):
        dit_accel.plan("proxy", VIDEO, gate="hidden").attend(q, k, v, module=HiddenGate(24, 24, 3))
    with pytest.raises(DitAccelError, match="to_q"):
        HiddenGate(0, 24, 3)


def test_a_gate_of_hidden_states_needs_those_of_the_text_too(tiny_flux, flux_inputs):
    with dit_accel.accelerated(tiny_flux(), "proxy", gate="hidden") as accel:
        with pytest.raises(DitAccelError, match=names(156)):
            next(iter(accel.transformers.values()))(**flux_inputs((13, 11)))


@pytest.mark.parametrize("query", ["block", "token"])
@pytest.mark.parametrize("grid", [TEXT, FIRST, VIDEO], ids=str)
@pytest.mark.parametrize("cut_at", [None, 3], ids=["whole", "two segments"])
def test_the_coarse_branch_covers_all_tokens(query, grid, cut_at):
    """Blocks of text and conditioning end where a segment does, whatever their size."""
    q, k, v, gate = inputs(grid)
    config = {"block": 8, "covers": "all", "gate": "hidden", "weigh": "blocks", "query": query}
    plan = dit_accel.plan("proxy", grid, **config)
    spans = [(grid.text_start, grid.text), (grid.conditioning_start, grid.conditioning)]
    spans = [(start, start + count) for start, count in spans if count]
    if cut_at is not None and spans:
        first, *others = spans
        spans = [(first[0], first[0] + cut_at), (first[0] + cut_at, first[1]), *others]
    runs = [run for span in spans for run in torch.arange(*span).split(8)]
    tiles = plan.block_of(plan.key_order)
    runs += [grid.visual_start + (tiles == tile).nonzero()[:, 0] for tile in range(plan.key_order.visual_blocks)]
    members = torch.stack([torch.zeros(grid.tokens).index_fill(0, run, 1.0) for run in runs]).double()

    def by_definition(fine, q, k, v, gate):
        means = [(members.to(x) / members.sum(-1, keepdim=True).to(x)) @ x for x in (q, k, v)]
        asking = means[0][:, :, members.argmax(0)] if query == "block" else q
        return fine + gate * ((asking @ means[1].mT * 24**-0.5).softmax(-1) @ means[2])

    segments, module = () if cut_at is None else tuple(sorted(spans)), HiddenGate(24, 24, 3)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))

    def differentiated(attend, dtype):
        """The output, and its gradients for q, k, v and the gate."""
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, gate)]
        out = attend(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(dtype))]

    def by_plan(q, k, v, gate):
        return plan.attend(q, k, v, module=module, gate=gate, segments=segments)

    def by_equation(q, k, v, gate):
        return by_definition(plan.attend(q, k, v), q, k, v, gate)

    plain, exact = (differentiated(by_equation, dtype) for dtype in (torch.float32, torch.float64))
    names = ("output", "q", "k", "v", "gate")
    for name, *values in zip(names, differentiated(by_plan, torch.float32), plain, exact, strict=True):
        assert_accurate(name, *values)
    assert (exact[0] - plan.attend(q, k, v).double())[:, :, : grid.visual_start or 1].abs().max() > 0.1


def test_what_cannot_cover_all_tokens_is_refused():
    with pytest.raises(DitAccelError, match="covers=all needs gate=hidden"):
        Config(covers="all")
    q, k, v, gate = inputs(TEXT)
    plan = dit_accel.plan("proxy", TEXT, covers="all", gate="hidden")
    with pytest.raises(DitAccelError, match="covers=visual"):
        plan.attend(q, k, v, module=HiddenGate(24, 24, 3), gate=gate, text_lens=torch.tensor([2, 9]))
