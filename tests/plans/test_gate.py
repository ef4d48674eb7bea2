"""The learned gate: as the means before training, its scores, its target and its gradients from the definition."""

import pytest
import torch
from accuracy import assert_accurate

import dit_accel
from dit_accel.hooks.selfcheck import ComputedAttention
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.plans.gate import BlockGate, divergence, gate_sample, pooled_map
from dit_accel.tokens import TokenGrid

RAGGED = TokenGrid(3, 5, 7, text=6, conditioning=2)
SETTINGS = {
    "raster": ("sparge", {"topk": 0.3, "topp": 0.2, "block_q": 16, "block": 8}),
    "tile": ("sparge", {"topk": 0.3, "topp": 0.0, "block_q": 16, "block": 8, "order": "tile"}),
    "hilbert": ("sparge", {"topk": 0.2, "topp": 0.0, "block_q": 8, "block": 8, "order": "hilbert"}),
    "sla": ("sla", {"topk": 0.3, "skip": 0.2, "linear_scope": "marginal", "block_q": 16, "block": 8, "order": "tile"}),
}
HEADS, DIM = 3, 8


@pytest.fixture(params=SETTINGS, ids=SETTINGS)
def case(request):
    """Method, settings, q, k, v, and the layer's module with a random gate."""
    method, config = SETTINGS[request.param]
    gate = BlockGate(DIM, HEADS)
    module = gate
    if method == "sla":
        module = SparseLinearAttention(DIM, HEADS, score="learned", **config)
        gate = module.gate
    for weight in gate.parameters():
        weight.data = torch.randn_like(weight)
    return method, config, torch.randn(3, 2, HEADS, RAGGED.tokens, DIM), module, gate


def plan_of(method, config, score):
    return dit_accel.plan(method, RAGGED, score=score, **config)


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_an_untrained_gate_ranks_by_means(case, impl):
    method, config, (q, k, _), *_ = case
    fresh = SparseLinearAttention(DIM, HEADS, score="learned", **config) if method == "sla" else BlockGate(DIM, HEADS)
    wanted = plan_of(method, config, "mean").route(q, k, impl=impl)
    for module in (fresh, None):
        lists = plan_of(method, config, "learned").route(q, k, impl=impl, module=module)
        assert all(torch.equal(*pair) for pair in zip(lists[:2], wanted[:2], strict=True))


def by_hand(plan, gate, q, k):
    """Scores [B, H, query blocks, key blocks] in the dtype of q, block by block."""
    q, k = (x[:, :, RAGGED.visual_rows] for x in (q, k))
    blocks = [
        [x[:, :, of == i] for i in range(order.visual_blocks)]
        for x, order in ((q, plan.query_order), (k, plan.key_order))
        for of in [plan.block_of(order)]
    ]
    a = torch.stack([x.mean(2) for x in blocks[0]], 2)
    b = torch.stack([torch.cat([x.mean(2), x.amax(2), x.amin(2)], -1) for x in blocks[1]], 2)
    queries, keys = gate.queries.to(a), gate.keys.to(a)
    return a, b, torch.einsum("bhid,hed,bhjf,hef->bhij", a, queries, b, keys)


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_the_best_blocks_are_those_of_the_definition(case, impl):
    method, config, (q, k, v), module, gate = case
    plan = plan_of(method, {**config, "topp": 0.0} if method == "sparge" else config, "learned")
    lists = plan.route(q, k, impl=impl, module=module)
    *_, scores = by_hand(plan, gate, q.double(), k.double())
    count = int(config["topk"] * plan.key_order.visual_blocks)
    wanted = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count).indices, True)
    assert torch.equal(lists.map(lists.used, plan.key_order.visual_blocks), wanted)
    # of some heads of the layer, as a process of several has them
    part = plan.route(q[:, 1:], k[:, 1:], impl=impl, module=module, heads=(1, HEADS))
    assert torch.equal(part.indices, lists.indices[:, 1:])
    out = plan.attend(q, k, v, impl=impl, module=module)
    assert not torch.equal(out, plan.attend(q, k, v, impl=impl))


def test_the_target_and_the_gradients_equal_the_definition(case):
    """Loss and gradients by name, against fp64 by hand: d loss / d x = s (softmax(s x) - T) / rows."""
    method, config, (q, k, v), module, gate = case
    plan = plan_of(method, config, "learned")
    lens = torch.tensor([2, 6])

    def exact(q, k):
        logits, position = q @ k.mT * DIM**-0.5, torch.arange(RAGGED.tokens) - RAGGED.text_start
        padding = (position >= lens[:, None]) & (position < RAGGED.text)
        dense = logits.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
        dense = dense[:, :, RAGGED.visual_rows, RAGGED.visual_rows]
        rows, columns = (plan.block_of(order) for order in (plan.query_order, plan.key_order))
        pooled = [
            torch.stack(
                [dense[:, :, rows == i][..., columns == j].amax((-1, -2)) for j in range(columns.max() + 1)], -1
            )
            for i in range(rows.max() + 1)
        ]
        target = torch.stack(pooled, 2)
        target = target / target.sum(-1, keepdim=True)
        a, b, scores = by_hand(plan, gate, q, k)
        shares = (scores * DIM**-0.5).softmax(-1)
        loss = (target * (target / shares).log().nan_to_num(0)).sum() / shares[..., 0].numel()
        of_scores = DIM**-0.5 * (shares - target) / shares[..., 0].numel()
        sizes = DIM**-0.5 * (shares + target) / shares[..., 0].numel()
        of_gate = [torch.einsum("bhij,bhjf,hef,bhid->hed", of_scores, b, gate.keys.to(a), a)]
        of_gate.append(torch.einsum("bhij,bhid,hed,bhjf->hef", of_scores, a, gate.queries.to(a), b))
        size = [torch.einsum("bhij,bhjf,hef,bhid->hed", sizes, b.abs(), gate.keys.to(a).abs(), a.abs())]
        size.append(torch.einsum("bhij,bhid,hed,bhjf->hef", sizes, a.abs(), gate.queries.to(a).abs(), b.abs()))
        return [target, loss, *of_gate], size

    call = ComputedAttention("", "", None, plan, q, k, v, v, text_lens=lens, module=module)
    gate.requires_grad_(True)
    sample = gate_sample(call)
    loss = divergence(sample)
    got = [pooled_map(call), loss.detach(), *torch.autograd.grad(loss, [gate.queries, gate.keys])]
    (truth, size), (plain, _) = exact(q.double(), k.double()), exact(q, k)
    names = ("target", "loss", "queries", "keys")
    for name, *tensors, magnitude in zip(names, got, plain, truth, (None, None, *size), strict=True):
        assert_accurate(name, *tensors, magnitude)
    assert sample.gate is gate and not sample.a.requires_grad and torch.equal(sample.target, got[0])


def test_the_gate_learns_which_blocks_matter_to_the_embedded_model():
    """From four videos' first steps: recall of the true best blocks rises in two other videos."""
    from dit_accel.pipelines.demo import load_demo

    pipe = load_demo()
    pipe.set_progress_bar_config(disable=True)
    config = {"topk": 0.2, "topp": 0.0, "score": "learned", "block_q": 16, "block": 16, "order": "tile"}
    size = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    prompts = [
        f"a {word}" for word in ("red circle", "blue square", "green star", "white circle", "red star", "circle")
    ]
    samples = []
    with (
        dit_accel.accelerated(pipe, "sparge", **config) as accel,
        accel.watch(lambda c: samples.append(gate_sample(c))),
    ):
        pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="latent", **size)
        weights = [weight for gate in accel.learned_weights().values() for weight in gate.parameters()]
    learned, unseen = (
        [sample._replace(a=sample.a[some], b=sample.b[some], target=sample.target[some]) for sample in samples]
        for some in (slice(4), slice(4, 6))
    )

    def recall():
        recalls = []
        for sample in unseen:
            queries, keys = sample.gate(sample.a, sample.b)
            best, chosen = (x.topk(2).indices for x in (sample.target, queries @ keys.mT))
            recalls.append(torch.zeros_like(sample.target).scatter(-1, chosen, 1.0).gather(-1, best).mean().item())
        return sum(recalls) / len(recalls)

    before = recall()
    optimizer = torch.optim.Adam([weight.requires_grad_(True) for weight in weights], lr=2e-3)
    for _ in range(10):
        optimizer.zero_grad()
        torch.stack([divergence(sample) for sample in learned]).mean().backward()
        optimizer.step()
    assert recall() > before + 0.03, "three of a hundred true best blocks more"
