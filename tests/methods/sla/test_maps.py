"""Feature maps by their papers' formulas, Hedgehog's learned map, and linear attention alone (topk=0)."""

import pytest
import torch
import torch.nn.functional as F
from messages import names
from sla_calls import TEXT_LAST, VIDEO

import dit_accel
from dit_accel.kernels.sla.arguments import EPSILON, apply_map
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.plans.plan import attention
from dit_accel.registry import plan

LINEAR = {"topk": 0.0, "block": 16}


def test_the_focused_map_keeps_the_norm():
    """FLatten's formula as it stands, in fp64; large and small rows keep their norm in fp32, and zeros stay zeros."""
    torch.manual_seed(0)
    x = torch.randn(50, 16, dtype=torch.float64)
    r = x.relu()
    written = r.norm(dim=-1, keepdim=True) / (r**3).norm(dim=-1, keepdim=True) * r**3
    torch.testing.assert_close(apply_map(x, "focused"), written, rtol=1e-13, atol=0)
    for size in (1e-12, 1.0, 1e12):  # whose cubes' squares leave the range of fp32
        mapped = apply_map(size * x.float(), "focused")
        torch.testing.assert_close(mapped.norm(dim=-1), (size * r.float()).norm(dim=-1), rtol=1e-6, atol=0)
    zeros = -torch.rand(3, 16, requires_grad=True)
    apply_map(zeros, "focused").sum().backward()
    assert not apply_map(zeros, "focused").any()


def test_hedgehog_starts_as_the_softmax_of_both_signs():
    """At the identity it is the plain softmax of q and k beside that of -q and -k."""
    torch.manual_seed(0)
    module = SparseLinearAttention(16, 2, **LINEAR, feature_map="hedgehog").double()
    q, k, v = torch.randn(3, 1, 2, VIDEO.tokens, 16, dtype=torch.float64)
    weights = sum((sign * q).softmax(-1) @ (sign * k).softmax(-1).mT for sign in (1, -1))
    expected = weights @ v / (weights.sum(-1, keepdim=True) + EPSILON)
    torch.testing.assert_close(module(q, k, v, grid=VIDEO), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(module(q, k, v, grid=VIDEO), attention(q, k, v, plan("sla", VIDEO, **vars(module.config))))
    assert not SparseLinearAttention(16, 2, feature_map="hedgehog").proj.weight.any()


def test_heads_of_one_process_take_their_own_maps():
    """Under context parallelism a call has some heads of its layer."""
    torch.manual_seed(0)
    module = SparseLinearAttention(8, 4, **LINEAR, feature_map="hedgehog")
    torch.nn.init.normal_(module.features.weight)
    q, k, v = torch.randn(3, 1, 4, VIDEO.tokens, 8)
    whole = module(q, k, v, grid=VIDEO)
    shard = plan("sla", VIDEO, **vars(module.config)).attend(
        *(x[:, 2:] for x in (q, k, v)), module=module, heads=(2, 4), impl="portable"
    )
    torch.testing.assert_close(shard, whole[:, 2:])
    with pytest.raises(dit_accel.DitAccelError, match=names(1, 2, "heads", "q")):
        module(q[:, 2:], k[:, 2:], v[:, 2:], grid=VIDEO)


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_text_stays_exact_without_critical_blocks(impl):
    """Visual queries see the text by softmax alone, whatever the linear branch adds."""
    torch.manual_seed(0)
    module = SparseLinearAttention(8, **LINEAR)
    torch.nn.init.zeros_(module.proj.weight)
    q, k, v = torch.randn(3, 2, 2, TEXT_LAST.tokens, 8)
    lens, grid = torch.tensor([0, 5]), TEXT_LAST
    out = module(q, k, v, grid=grid, text_lens=lens, impl=impl)
    start = grid.visual_start + grid.visual
    for sample, length in enumerate(lens.tolist()):
        keys = torch.cat([torch.arange(start, start + grid.conditioning), grid.text_start + torch.arange(length)])
        expected = F.scaled_dot_product_attention(q[sample], k[sample][:, keys], v[sample][:, keys])
        torch.testing.assert_close(out[sample][:, grid.visual_rows], expected[:, grid.visual_rows], rtol=0, atol=1e-5)


def test_a_pipeline_keeps_its_learned_maps(tiny_wan, wan_inputs, tmp_path):
    """Weights of every head are saved, loaded and used; the report says what ran."""
    transformer, inputs = tiny_wan(), wan_inputs()
    accel = dit_accel.accelerate(transformer, "sla", **LINEAR, feature_map="hedgehog")
    for module in accel.learned_weights().values():
        assert module.features.weight.shape[:2] == (2, transformer.config.num_attention_heads)
        torch.nn.init.normal_(module.features.weight)
    with torch.no_grad():
        out = transformer(**inputs, return_dict=False)[0]
    assert "density 0.0000 (portable" in str(accel.report())
    accel.save_pretrained(tmp_path)
    accel.remove()
    with dit_accel.load(transformer, tmp_path), torch.no_grad():
        assert torch.equal(transformer(**inputs, return_dict=False)[0], out)
