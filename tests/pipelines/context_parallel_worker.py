"""One process of several that share a sequence: runs every case and writes down what came out; see the test beside it.

The test runs this file with `FOLDER`, `RANK`, `RANKS` and `MODELS` (names) among its globals.
"""

import json
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import accelerated_runs
import tiny_models
from accelerated_runs import IMAGE, ROUTED, SLA, VIDEO, accelerated
from accuracy import error_budget

import dit_accel

FOLDER, RANK, RANKS = pathlib.Path(globals()["FOLDER"]), globals()["RANK"], globals()["RANKS"]
# Wan with latents of 4 x 4 x 8 tokens, which two and four processes divide.
EVEN = {"frames": 4, "height": 8, "width": 16}
WINDOW = {"window": (3, 3, 5)}


def main():
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/meeting", rank=RANK, world_size=RANKS)
    torch.accelerator.device_count = lambda: 1  # Diffusers asks how many there are, and a CPU says none
    context_parallel._all_gather_anything = all_gather_anything
    torch.set_num_threads(1)
    (FOLDER / f"{RANK}.json").write_text(json.dumps(dict(cases())))
    dist.destroy_process_group()


def cases():
    wan, flux = tiny_models.module("wan"), tiny_models.module("flux")
    video, image = tiny_models.get("wan", "t2v"), tiny_models.get("flux", "t2i")
    yield from every_method(
        "odd heads", video, lambda: wan.build(num_attention_heads=2 * RANKS - 1), (VIDEO[0], SLA, *ROUTED)
    )
    yield from equal_shares(lambda: wan.build(num_attention_heads=RANKS), wan.inputs(**EVEN))
    if RANKS > 2:
        build = lambda: flux.build(num_attention_heads=RANKS)  # noqa: E731
        yield from every_method("joint", image, build, (IMAGE[0], SLA))
        return
    for tiny in tiny_models.all_models():
        if str(tiny) in globals()["MODELS"]:
            yield from every_method(str(tiny), tiny, tiny.build, accelerated_runs.settings(tiny))


def every_method(name, tiny, build, settings):
    """One model in one process and in several, also as Diffusers alone runs it; nothing divides by their number."""
    single, shared, double = build(), share_out(build(), ulysses_anything=True), build().double()
    inputs, exact_inputs = (without_masks(tiny, tiny.call(dtype=dtype)) for dtype in (torch.float32, torch.float64))
    alone = tiny_models.run(single, inputs)
    try:
        together = tiny_models.run(shared, inputs)
    except RuntimeError as error:
        yield f"{name}/dense", {"diffusers": str(error)}
        return
    yield f"{name}/dense", compare(together, alone, tiny_models.run(double, exact_inputs))
    for method, config in settings:
        plain, _ = accelerated(single, inputs, method, config)
        exact, _ = accelerated(double, exact_inputs, method, config)
        got, report = accelerated(shared, inputs, method, config)
        yield f"{name}/{method}", compare(got, plain, exact) | {"report": report.as_dict()}


def without_masks(tiny, inputs):
    """LTX makes a mask with as many heads as the model has, which Diffusers cannot use on a share of them."""
    return {**inputs, "encoder_attention_mask": None} if tiny.family == "ltx" else inputs


def equal_shares(build, inputs):
    """Without `ulysses_anything`: sparse, then dense steps, gradients, and compiled."""
    single, shared, double = build(), share_out(build()), build().double()
    exact_inputs = tiny_models.cast(inputs, torch.float64)
    plain, _ = accelerated(single, inputs, "gna", WINDOW)
    exact, _ = accelerated(double, exact_inputs, "gna", WINDOW)
    yield "equal shares", compare(accelerated(shared, inputs, "gna", WINDOW)[0], plain, exact)
    yield "gradients", compare(gradient(shared, inputs), gradient(single, inputs), gradient(double, exact_inputs))
    dense = [tiny_models.run(transformer, inputs) for transformer in (shared, single)]
    with dit_accel.accelerated(shared, "gna", dense_steps=1, **WINDOW) as accel:
        accel.set_step(0, 2)
        step = tiny_models.run(shared, inputs)
    yield "dense step", {"identical": torch.equal(step, dense[0])}
    yield "dense", compare(dense[0], dense[1], tiny_models.run(double, exact_inputs))
    for cache in ("first-block:threshold=0.05", "mag:threshold=0.05"):
        (got, steps), (plain_steps, alone), (exact_steps, _) = (
            cached(transformer, given, cache)
            for transformer, given in ((shared, inputs), (single, inputs), (double, exact_inputs))
        )
        yield f"cached/{cache}", compare(got, plain_steps, exact_steps)
        yield f"skipped/{cache}", {"identical": steps == alone and 0 < sum(share < 1 for share in alone.values())}
    if RANKS == 2:
        shared.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        yield "compiled", compare(accelerated(shared, inputs, "gna", WINDOW)[0], plain, exact)


def cached(transformer, inputs, cache):
    """Outputs of four steps under a step cache, and the share of layers that ran in each."""
    outputs = []
    with dit_accel.accelerated(transformer, "gna", cache=cache, dense_layers=0, **WINDOW) as accel:
        for step in range(4):
            accel.set_step(step, 4)
            hidden_states = inputs["hidden_states"] * (1 + step / 20)
            outputs.append(tiny_models.run(transformer, inputs | {"hidden_states": hidden_states}))
        return torch.stack(outputs), accel.report().cache.branches[0].steps


def all_gather_anything(tensor, dim, group):
    """Diffusers' gathering of the output, which relies on NCCL for pieces of unequal length: gloo has none."""
    sizes = context_parallel.gather_size_by_comm(tensor.shape[dim], group)
    tensor = tensor.movedim(dim, 0)
    padded = F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, max(sizes) - len(tensor)]).contiguous()
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)]).movedim(0, dim)


def share_out(transformer, **config):
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS, **config))
    return transformer


def gradient(transformer, inputs):
    """Of one weight. Each process has what its own tokens give; together that is what one process has."""
    with dit_accel.accelerated(transformer, "gna", **WINDOW):
        transformer(**inputs, return_dict=False)[0].square().mean().backward()
    found = transformer.blocks[0].attn1.to_k.weight.grad.clone()
    transformer.zero_grad()
    if transformer._parallel_config is not None:
        dist.all_reduce(found)
    return found


def compare(got, plain, exact):
    return {
        "error": (got.double() - exact).abs().max().item(),
        "budget": error_budget(plain, exact),
        "scale": exact.abs().max().item(),
    }


main()
