"""One process of several that share a sequence: runs every case and writes down what came out; see the test beside it.

The test runs this file with `FOLDER`, `RANK`, `RANKS`, `RUNS` and `DIFFUSERS` among its globals.
"""

import itertools
import json
import os
import pathlib
import signal
import sys
import time

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
from ring_cases import ring_cases

import dit_accel
from dit_accel.pipelines import attention

FOLDER, RANK, RANKS = pathlib.Path(globals()["FOLDER"]), globals()["RANK"], globals()["RANKS"]
# Wan with latents of 4 x 4 x 8 tokens, which two and four processes divide.
EVEN = {"frames": 4, "height": 8, "width": 16}
WINDOW = {"window": (3, 3, 5)}
# with sizes that make four heads: tokens counted from the first, sound that attends to all of the video, two attentions
FOUR_HEADS = {
    "hunyuan_video:i2v": {"num_attention_heads": 4, "image_condition_type": "token_replace"},
    "kandinsky6:reference": {"model_dim": 64},
    "sd3:3.5-medium": {"num_attention_heads": 4, "caption_projection_dim": 64, "dual_attention_layers": (0, 1)},
}
TURNS = itertools.cycle(range(RANKS))  # whose turn it is to run a case in one process
CACHES = (
    "first-block:threshold=0.05",
    "mag:threshold=0.05",
    "taylorseer:taylor_factors_dtype=float32",
    "steps:computed=0x1x3",
)


def main():
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/meeting", rank=RANK, world_size=RANKS)
    torch.accelerator.device_count = lambda: 1  # Diffusers asks how many there are, and a CPU says none
    context_parallel._all_gather_anything = all_gather_anything
    torch.set_num_threads(1)
    (FOLDER / f"{RANK}.json").write_text(json.dumps(dict(cases())))
    if RANKS == 2:
        outlive_another()
    dist.destroy_process_group()


def cases():
    wan, flux = tiny_models.module("wan"), tiny_models.module("flux")
    video, image = tiny_models.get("wan", "t2v"), tiny_models.get("flux", "t2i")
    build = lambda: wan.build(num_attention_heads=2 * RANKS - 1)  # noqa: E731
    yield from every_method("odd heads", video, build, (VIDEO[0], SLA, *ROUTED))
    yield from balanced_heads(video, build)
    yield from equal_shares(lambda: wan.build(num_attention_heads=RANKS), wan.inputs(**EVEN))
    yield from ring_cases(RANK, RANKS, in_turn, gradient, cached)
    if RANKS > 2:
        build = lambda: flux.build(num_attention_heads=RANKS)  # noqa: E731
        yield from every_method("joint", image, build, (IMAGE[0], SLA))
        for name, sizes in FOUR_HEADS.items():
            family, _, model = name.partition(":")
            tiny, module = tiny_models.get(family, model), tiny_models.module(family)
            yield from every_method(name, tiny, lambda module=module, sizes=sizes: module.build(**sizes), (SLA,))
        return
    for tiny in tiny_models.all_models():
        if str(tiny) in globals()["RUNS"]:
            methods = [run for run in accelerated_runs.settings(tiny) if run[0] in globals()["RUNS"][str(tiny)]]
            yield from every_method(str(tiny), tiny, tiny.build, methods)
        if str(tiny) in globals()["DIFFUSERS"]:
            yield from every_method(f"Diffusers/{tiny}", tiny, tiny.build, accelerated_runs.settings(tiny)[:1])
    for tiny in (video, tiny_models.get("hunyuan_video", "t2v")):
        yield from step_caches(tiny)
    yield from calibration(video)


def every_method(name, tiny, build, settings):
    """One model in one process and in several; nothing divides by their number. Dense too, by Diffusers or by us."""
    single, shared = build(), build()
    double = build().double() if tiny.doubles else single
    inputs, exact_inputs = tiny.call(), tiny.double_call()
    if name.startswith("Diffusers/"):
        share_out(shared, ulysses_anything=True)
        inputs, exact_inputs = without_masks(tiny, inputs), without_masks(tiny, exact_inputs)
        together = tiny_models.run(shared, inputs)
    else:
        dit_accel.parallelize(shared, ulysses=RANKS)
        together, _ = accelerated(shared, inputs, "dense", {})
    alone = ((single, inputs), (double, exact_inputs))
    yield f"{name}/dense", in_turn(together, lambda: (tiny_models.run(*case) for case in alone))
    for method, config in settings:
        output, report = accelerated(shared, inputs, method, config)
        comparison = in_turn(
            output, lambda method=method, config=config: (accelerated(*case, method, config)[0] for case in alone)
        )
        yield f"{name}/{method}", comparison | {"report": report.as_dict()}


def balanced_heads(tiny, build):
    """Heads go to other processes from the second call on; the outputs stay those of one process."""
    shared, single, double = build(), build(), build().double()
    dit_accel.parallelize(shared)
    calls = [call | {"hidden_states": call["hidden_states"] * scale} for scale in (1, 3) for call in [tiny.call()]]
    orders, deal = [], attention.dealt

    def noted(weights, gpus):
        order = deal(weights, gpus)
        orders.append(order.tolist())
        return order

    attention.dealt = noted
    try:
        with dit_accel.accelerated(shared, "sol", block=8, block_q=8, tau=1.0):
            shared_outputs = torch.stack([tiny_models.run(shared, call) for call in calls])
    finally:
        attention.dealt = deal
    alone = []
    for transformer, dtype in ((single, torch.float32), (double, torch.float64)):
        with dit_accel.accelerated(transformer, "sol", block=8, block_q=8, tau=1.0):
            outputs = [tiny_models.run(transformer, tiny_models.cast(call, dtype)) for call in calls]
        alone.append(torch.stack(outputs))
    yield "balanced heads", compare(shared_outputs, *alone) | {"orders": orders}


def in_turn(output, references):
    """One process compares its result with those of one process, plain and exact; the others' are equal to its own."""
    turn = next(TURNS)
    first = output.clone()
    dist.broadcast(first, turn)
    return compare(output, *references()) if turn == RANK else {"identical": torch.equal(output, first)}


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
    parallelized = build()
    dit_accel.parallelize(parallelized)
    for name, several in (("", shared), (" of ours", parallelized)):
        together, alone, wide = gradient(several, inputs), gradient(single, inputs), gradient(double, exact_inputs)
        yield f"gradients{name}", compare(together, alone, wide)
    dense = [tiny_models.run(transformer, inputs) for transformer in (shared, single)]
    with dit_accel.accelerated(shared, "gna", dense_steps=1, **WINDOW) as accel:
        accel.set_step(0, 2)
        step = tiny_models.run(shared, inputs)
    yield "dense step", {"identical": torch.equal(step, dense[0])}
    yield "dense", compare(dense[0], dense[1], tiny_models.run(double, exact_inputs))
    with dit_accel.accelerated(parallelized, "gna", dense_steps=1, dense_layers=1, **WINDOW) as accel:
        accel.set_step(0, 2)
        yield (
            "dense step of ours",
            compare(tiny_models.run(parallelized, inputs), dense[1], tiny_models.run(double, exact_inputs)),
        )
    if RANKS == 2:
        for name, several in (("compiled", shared), ("compiled ours", parallelized)):
            several.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
            yield name, compare(accelerated(several, inputs, "gna", WINDOW)[0], plain, exact)


def step_caches(tiny):
    """Four steps under each cache. In the third, tokens of the first process change much, and the others hardly do."""
    single, shared, double = tiny.build(), tiny.build(), tiny.build().double()
    dit_accel.parallelize(shared)
    for cache in CACHES:
        output, steps = cached(shared, tiny.call(), cache)
        plain, alone = cached(single, tiny.call(), cache)
        yield f"cached/{tiny}/{cache}", compare(output, plain, cached(double, tiny.double_call(), cache)[0])
        yield (
            f"skipped/{tiny}/{cache}",
            {"identical": steps == alone and min(alone.values()) < 1 == max(alone.values())},
        )


def cached(transformer, inputs, cache):
    """Outputs of four steps under a step cache, and the share of layers that ran in each."""
    outputs = []
    with dit_accel.accelerated(transformer, "gna", cache=cache, dense_layers=0, **WINDOW) as accel:
        for step in range(4):
            accel.set_step(step, 4)
            hidden_states = inputs["hidden_states"].clone()
            hidden_states[:, :, :2] *= 3 if step > 1 else 1
            outputs.append(tiny_models.run(transformer, inputs | {"hidden_states": hidden_states}))
        return torch.stack(outputs), accel.report().cache.branches[0].steps


def calibration(tiny):
    """The ratios of all tokens, in every process."""
    single, shared = tiny.build(), tiny.build()
    dit_accel.parallelize(shared)
    ratios = []
    for transformer in (shared, single):
        with dit_accel.accelerated(transformer, "dense", cache="mag:calibrate=true") as accel:
            for step in range(3):
                accel.set_step(step, 3)
                inputs = tiny.call()
                inputs["hidden_states"][:, :, :2] *= 1 + step
                tiny_models.run(transformer, inputs)
            ratios.append(torch.tensor(accel.report().cache.ratios["transformer"]["call 0"], dtype=torch.float64))
    yield "calibration", {"error": (ratios[0] - ratios[1]).abs().max().item(), "budget": 1e-6, "scale": 1.0}


def outlive_another():
    """The last process is killed within a call; the first one says so at once."""
    tiny = tiny_models.get("wan", "t2v")
    transformer = tiny.build()
    dit_accel.parallelize(transformer)
    if RANK:
        transformer.blocks[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    start = time.monotonic()
    try:
        accelerated(transformer, tiny.call(), *VIDEO[0])
    except dit_accel.DitAccelError as error:
        (FOLDER / "outlived.json").write_text(json.dumps({"said": str(error), "after": time.monotonic() - start}))


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
    of_weight = transformer.blocks[0].attn1.to_k.weight.grad.clone()
    transformer.zero_grad()
    if transformer._parallel_config is not None:
        dist.all_reduce(of_weight)
    return of_weight


def compare(output, plain, exact):
    return {
        "error": (output.double() - exact).abs().max().item(),
        "budget": error_budget(plain, exact),
        "scale": exact.abs().max().item(),
    }


main()
