"""What a sort of the keys by their importance would win: `python -m tools.demo.key_order`.

PBS-Attn (arXiv 2510.21270) permutes the keys of each head before they are cut into blocks, so that important ones share
blocks. This prints, for the embedded model's own queries and keys, how much of dense attention's weight the best blocks
by their means hold, all at one density. Orders of the grid stand beside sorts by importance: the mean softmax weight
over 64 spaced queries, of all keys of a head or within runs of five blocks.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

import dit_accel
from dit_accel.hooks.selfcheck import ComputedAttention
from dit_accel.pipelines.demo import load_demo
from dit_accel.plans.curves import along
from dit_accel.plans.routed import Ordering, cut
from dit_accel.tokens import TokenGrid
from tools.demo.evaluate import fixed_scenes

BLOCK, LISTED, RUN, SAMPLED = 16, 6, 5, 64
SIZE = {"num_frames": 9, "height": 96, "width": 96}  # 720 tokens, 45 blocks
GRID_ORDERS: tuple[Ordering, ...] = ("raster", "tile", "hilbert")


def walk(order: Ordering, grid: TokenGrid) -> Tensor:
    """The visual tokens in the order of their blocks: int64 [N]."""
    queries, _, curve = cut(order, grid, BLOCK, BLOCK)
    if curve is not None:
        return along(curve, grid.shape)
    tokens = queries.index()
    return tokens[tokens >= 0]


def kept_weight(q: Tensor, k: Tensor) -> float:
    """Share of dense attention's weight in the blocks with the best scores of means; q, k [1, H, N, D] in blocks."""
    dense = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    of_blocks = dense.unflatten(-1, (-1, BLOCK)).sum(-1).unflatten(2, (-1, BLOCK)).mean(3)
    queries, keys = (x.unflatten(2, (-1, BLOCK)).mean(3) for x in (q, k))
    return of_blocks.gather(-1, (queries @ keys.mT).topk(LISTED).indices).sum(-1).mean().item()


def compare(q: Tensor, k: Tensor, grid: TokenGrid) -> dict[str, float]:
    """The kept weight of one call by order of the keys."""
    weights: dict[str, float] = {
        order: kept_weight(q[:, :, walk(order, grid)], k[:, :, walk(order, grid)]) for order in GRID_ORDERS
    }
    some = q[:, :, torch.linspace(0, grid.visual - 1, SAMPLED).long()]
    importance = (some @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(2)  # [1, H, N]
    for order in GRID_ORDERS:
        tokens = walk(order, grid)
        for name, run in (("all", grid.visual), ("runs", RUN * BLOCK)):
            place = importance[..., tokens].unflatten(-1, (-1, run)).argsort(-1, descending=True)
            keys = tokens[(place + torch.arange(0, grid.visual, run)[:, None]).flatten(-2)]
            weights[f"sorted, {name}, queries {order}"] = kept_weight(
                q[:, :, tokens], k.take_along_dim(keys[..., None], 2)
            )
    return weights


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipe = load_demo()
    pipe.set_progress_bar_config(disable=True)
    weights: defaultdict[str, list[float]] = defaultdict(list)

    def note(call: ComputedAttention) -> None:
        for name, value in compare(call.q, call.k, call.plan.grid).items():
            weights[name].append(value)

    everything = {"topk": 1.0, "topp": 0.0, "block_q": BLOCK, "block": BLOCK}
    with dit_accel.accelerated(pipe, "sparge", **everything) as accel, accel.watch(note):
        for seed, scene in enumerate(fixed_scenes(2)):
            generator = torch.Generator().manual_seed(seed)
            pipe(scene.caption, generator=generator, num_inference_steps=6, guidance_scale=1.0, **SIZE)
    for name, values in weights.items():
        above = sum(weight > raster for weight, raster in zip(values, weights["raster"], strict=True))
        print(f"{name}: {sum(values) / len(values):.3f}, above raster in {above} of {len(values)} calls")


if __name__ == "__main__":
    main()
