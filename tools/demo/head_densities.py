"""Record how many pairs each head of the embedded model keeps: `python -m tools.demo.head_densities`.

`dit-accel bench --count` simulates from the record how evenly several GPUs would share the heads.
"""

from __future__ import annotations

import json

import torch

import dit_accel
from dit_accel.bench.balance import RECORD
from dit_accel.files import MARK, replace_file
from dit_accel.generation.provenance import versions
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.pipelines.demo import DEFAULTS, load_demo
from dit_accel.plans.routed import RoutedPlan
from tools.demo.evaluate import fixed_scenes

SETTINGS = ("sparge", "sol", "rectified")  # each with its defaults; other methods keep equally many in every head
PROMPTS = 1


def main() -> None:
    pipe = load_demo()
    pipe.set_progress_bar_config(disable=True)
    prompts = [scene.caption for scene in fixed_scenes(PROMPTS)]
    layers, steps = len(pipe.transformer.blocks), DEFAULTS.call()["num_inference_steps"]
    calls: list[torch.Tensor] = []
    add_density = RoutedPlan.add_density

    def record(plan: RoutedPlan, lists: BlockLists, density_sum: torch.Tensor) -> None:
        calls.append(plan.visual_pairs(lists)[0] / plan.grid.visual**2)
        add_density(plan, lists, density_sum)

    RoutedPlan.add_density = record  # type: ignore[method-assign, assignment]
    densities = {}
    for setting in SETTINGS:
        heads = []
        for prompt in prompts:
            calls.clear()
            with dit_accel.accelerated(pipe, setting):
                pipe(prompt, generator=torch.Generator().manual_seed(0), **DEFAULTS.call())
            courses = torch.stack(calls).view(steps, layers, -1).flatten(1).T  # [layers * heads, steps]
            heads += [[round(density, 4) for density in course] for course in courses.tolist()]
        densities[setting] = heads
    about = {"note": MARK, "call": DEFAULTS.call(), "prompts": prompts, "versions": versions()}
    replace_file(RECORD, (json.dumps(about | {"densities": densities}) + "\n").encode())


if __name__ == "__main__":
    main()
