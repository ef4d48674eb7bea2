"""Random weights under the names of published formats, and what their authors' formulas make of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pages
import torch


@dataclasses.dataclass(frozen=True)
class Example:
    """A format's weights in small, in the variable EXAMPLE of the format's test file; `test_formats.py` finds it.

    Args:
        family: of the model, as in `tiny_models`.
        published: the tensors under the published names, of a model.
        metadata: of the file.
        settings: that the user has to give.
    """

    family: str
    published: Callable[[torch.nn.Module], dict[str, torch.Tensor]]
    metadata: Callable[[dict[str, torch.Tensor]], Mapping[str, str] | None] = lambda tensors: None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# A weight of Diffusers' Wan, and its name in the original.
ORIGINAL = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"attn1\.norm_", "self_attn.norm_"),
    (r"attn2\.norm_", "cross_attn.norm_"),
    (r"attn1\.to_([qkv])\.", r"self_attn.\1."),
    (r"attn2\.to_([qkv])\.", r"cross_attn.\1."),
    (r"attn1\.to_out\.0", "self_attn.o"),
    (r"attn2\.to_out\.0", "cross_attn.o"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
)
# And in FastVideo.
FASTVIDEO = (
    (r"condition_embedder\.text_embedder\.linear_1", "condition_embedder.text_embedder.fc_in"),
    (r"condition_embedder\.text_embedder\.linear_2", "condition_embedder.text_embedder.fc_out"),
    (r"condition_embedder\.time_embedder\.linear_1", "condition_embedder.time_embedder.mlp.fc_in"),
    (r"condition_embedder\.time_embedder\.linear_2", "condition_embedder.time_embedder.mlp.fc_out"),
    (r"condition_embedder\.time_proj", "condition_embedder.time_modulation.linear"),
    (r"(blocks\.\d+)\.attn1\.(to_[qkv]|norm_[qk])\.", r"\1.\2."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.to_out"),
    (r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.attn2.to_out"),
    (r"ffn\.net\.0\.proj", "ffn.fc_in"),
    (r"ffn\.net\.2", "ffn.fc_out"),
    (r"(blocks\.\d+)\.norm2", r"\1.self_attn_residual_norm.norm"),
)


def renamed(weights, table):
    """A state dict under the names that a table gives."""

    def name(key):
        return next((re.sub(old, new, key) for old, new in table if re.search(old, key)), key)

    return {name(key): tensor for key, tensor in weights.items()}


def moved(model, seed=3, size=0.05):
    """A model's state dict with every weight moved, as a fine-tuning leaves it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + size * torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()
    }


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, before):
    """Whether a model's weights are those of a snapshot, bit for bit."""
    weights = model.state_dict()
    return weights.keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in weights.items())


def random(*shape, seed=5, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_formula(model, inputs, attend, attentions, where="diffusers.models.transformers.transformer_wan"):
    """A stock model's answer with `attend(layer, q, k, v, hidden)` in those of its modules, [B, H, N, D] each."""
    under_way = []

    def dispatch(query, key, value, **options):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if under_way:
            out = attend(under_way[0], q, k, v, under_way[1])
        else:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2)

    def entering(layer, args, kwargs):
        under_way[:] = layer, args[0] if args else kwargs["hidden_states"]

    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(mock.patch(f"{where}.dispatch_attention_fn", dispatch))
        for layer, module in enumerate(attentions):
            enter, leave = functools.partial(entering, layer), under_way.clear
            before = lambda module, args, kwargs, enter=enter: enter(args, kwargs)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(lambda *call, leave=leave: leave()).remove)
        return model(**inputs, return_dict=False)[0]


def in_dtype(inputs, dtype):
    """A call's inputs with their floating point tensors in another dtype."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def means(x, blocks):
    """Mean of the tokens of each block: x [B, H, N, D], blocks a list of index tensors."""
    return torch.stack([x[:, :, block].mean(2) for block in blocks], 2)


def runs(tokens, block):
    return list(torch.arange(tokens).split(block))


def tiles(grid, tile):
    """The tokens of each 3-D tile in raster order, tiles row by row and cut off at the far borders."""
    index = torch.arange(math.prod(grid)).reshape(grid)
    starts = [range(0, size, step) for size, step in zip(grid, tile, strict=True)]
    return [
        index[t : t + tile[0], h : h + tile[1], w : w + tile[2]].flatten()
        for t in starts[0]
        for h in starts[1]
        for w in starts[2]
    ]


def over_blocks(q, k, v, scores, count, query_blocks, key_blocks, always=()):
    """Exact attention of each query block to its `count` key blocks of the highest scores, and to the `always` keys.

    scores: [B, H, query blocks, key blocks]. Rows of queries in no block are left as they come.
    """
    out = torch.empty_like(q)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            for i, rows in enumerate(query_blocks):
                best = scores[b, h, i].topk(count).indices
                keys = torch.cat([*always, *(key_blocks[j] for j in best.tolist())])
                weights = (q[b, h, rows] @ k[b, h, keys].T * q.shape[-1] ** -0.5).softmax(-1)
                out[b, h, rows] = weights @ v[b, h, keys]
    return out


def sla(q, k, v, weight, bias, ratio=0.1, block_q=128, block=64):
    """TurboDiffusion's sparse-linear attention (SLA/core.py)."""
    queries, keys = runs(q.shape[2], block_q), runs(q.shape[2], block)
    scores = means(q, queries) @ means(k - k.mean(2, keepdim=True), keys).mT
    exact = over_blocks(q, k, v, scores, max(1, int(ratio * len(keys))), queries, keys)
    fq, fk = q.softmax(-1), k.softmax(-1)
    linear = fq @ (fk.mT @ v) / (1e-5 + fq @ fk.sum(2)[..., None])
    return exact + linear @ weight.T + bias


def vsa(q, k, v, gate, grid, sparsity, tile=(4, 4, 4), segments=()):
    """FastVideo's sparse attention (fastvideo-kernel ops.py); gate [B, H, N, D] or None.

    In MiniMax-H3 (video_sparse_attn_h3.py) segments of these lengths precede the video, in runs of at most a tile.
    """
    before = sum(segments)
    prefix = [run for segment in torch.arange(before).split(segments) for run in segment.split(math.prod(tile))]
    video = [before + block for block in tiles(grid, tile)]
    blocks = prefix + video
    scores = means(q, blocks) @ means(k, blocks).mT * q.shape[-1] ** -0.5
    count = min(max(math.ceil((1 - sparsity) * len(video)), 1), len(video))
    among = scores[:, :, len(prefix) :, len(prefix) :]
    out = over_blocks(q, k, v, among, count, video, video, always=prefix)
    out[:, :, :before] = (q[:, :, :before] @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    if gate is None:
        return out
    coarse = scores.softmax(-1) @ means(v, blocks)
    spread = torch.empty_like(q)
    for i, rows in enumerate(blocks):
        spread[:, :, rows] = coarse[:, :, i : i + 1]
    return out + gate * spread


def section(root, title):
    """The Python and the command lines of a section of docs/published-weights.md; None: of what precedes the first."""
    text = pages.section((root / "docs/published-weights.md").read_text(encoding="utf-8"), title)
    lines = pages.typed(text)
    assert lines, title
    return "".join(pages.blocks(text, "python")), lines
