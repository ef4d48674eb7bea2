"""Several processes for one sequence: the same result as one process, for every class that can be shared."""

import dataclasses
import functools
import json
import multiprocessing
import pathlib
import runpy
import signal
import types

import pytest
import torch
from accelerated_runs import settings
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import apply_context_parallel
from messages import names
from tiny_models import all_models, module, run

import dit_accel
from dit_accel.hooks.report import LayerReport, Report
from dit_accel.pipelines.sharding import Shared
from dit_accel.plans.ranges import even_shares
from dit_accel.registry import get_families
from dit_accel.setting import Setting

WORKER = pathlib.Path(__file__).with_name("context_parallel_worker.py")
WINDOW = {"window": (3, 5, 4)}


# Of the classes with a `_cp_plan`: run by Diffusers' `enable_parallelism` too. LTX-2's plan leaves out the positions of
# the attention between video and audio, and fails.
DIFFUSERS = {"flux:t2i", "flux2:t2i", "ltx:t2v", "qwen_image:t2i", "helios:t2v", "minimax_h3:fl2va", "wan:t2v"}
DIFFUSERS |= {"wan:chronoedit"}
NOT_IN_DIFFUSERS = {"ltx2:2.0"}
LARGE_IMAGES = {"flux", "flux2", "qwen_image", "z_image", "sd3"}


def can_be_shared(tiny):
    return get_families()[tiny.family].sharding_of(tiny.shared) is not None


@functools.cache
def runs():
    """By model, the methods that it runs: a family runs each once, and every model runs one."""
    chosen, seen = {}, set()
    for tiny in filter(can_be_shared, all_models()):
        methods = [method for method, _ in settings(tiny)]
        chosen[str(tiny)] = [method for method in methods if (tiny.family, method) not in seen] or methods[:1]
        seen |= {(tiny.family, method) for method in methods}
    return chosen


def test_all_videos_and_large_images_can_be_shared():
    families = {name for name, family in get_families().items() if "sol" in family.recommended} | LARGE_IMAGES
    left_out = {str(tiny) for tiny in all_models() if tiny.family in families and not can_be_shared(tiny)}
    assert left_out == set(), "name what stands against it"


def test_every_class_with_a_plan_of_diffusers_is_here():
    kinds = {type(tiny.shared) for tiny in all_models()}
    tested = {type(tiny.shared) for tiny in all_models() if str(tiny) in DIFFUSERS | NOT_IN_DIFFUSERS}
    assert {kind for kind in kinds if kind._cp_plan is not None} == tested


def declares_cells(test):
    """A `check` for each cell that two processes show."""
    cells = {(name.partition(":")[0], method) for name, methods in runs().items() for method in methods}
    marks = [pytest.mark.check("context parallel", family=family, method=method) for family, method in sorted(cells)]
    return functools.reduce(lambda marked, mark: mark(marked), marks, test)


def results_of(ranks, folder, ends):
    """What each of so many processes found, by case; how they end, the last one killed by a signal or not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers", "diffusers.models.transformers.transformer_wan"])
    worker_globals = [
        {"FOLDER": str(folder), "RANK": rank, "RANKS": ranks, "RUNS": runs(), "DIFFUSERS": DIFFUSERS}
        for rank in range(ranks)
    ]
    processes = [
        context.Process(target=runpy.run_path, args=(str(WORKER),), kwargs={"init_globals": names})
        for names in worker_globals
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(900)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == ends, "see the processes' output"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def assert_equal_to_one_process(results):
    """Every case within the error of one process against fp64, which is small, so that nothing can hide in it."""
    for of_process in results:
        for case, result in of_process.items():
            if "identical" in result:
                assert result["identical"], case
                continue
            assert result["error"] <= result["budget"] <= 1e-4 * result["scale"], (case, result)


def assert_heads_move(results):
    """Every layer's second call gives heads to other processes, alike in all of them."""
    orders = [of_process["balanced heads"]["orders"] for of_process in results]
    assert orders[0] and orders == orders[:1] * len(orders)
    assert any(order != sorted(order) for order in orders[0])


def report_of(result):
    names = [field.name for field in dataclasses.fields(Report)]
    fields = {name: result["report"][name] for name in names}
    layers = [LayerReport(**layer) for layer in fields["layers"]]
    return Report(**fields | {"setting": Setting.from_dict(fields["setting"]), "layers": layers})


@declares_cells
def test_two_processes(tmp_path, evidence):
    """Every model; text, image and one case's heads do not divide by two. At the end one process is killed."""
    results = results_of(2, tmp_path, [0, -signal.SIGKILL])
    assert_equal_to_one_process(results)
    assert_heads_move(results)
    for of_process in results:
        for name, methods in runs().items():
            for method in methods:
                evidence(report_of(of_process[f"{name}/{method}"]))
        assert {f"Diffusers/{name}/dense" for name in DIFFUSERS} <= of_process.keys()
        assert {"odd heads/gna", "gradients of ours", "dense step of ours", "compiled ours"} <= of_process.keys()
        assert {"ring 2/cogvideox:1.0/traffic of tile", "ring/gradients", "ring/cached", "ring/refused sparge"} <= set(
            of_process
        )
        assert {"skipped/wan:t2v/first-block:threshold=0.05", "calibration"} <= of_process.keys()
    outlived = json.loads((tmp_path / "outlived.json").read_text())
    assert outlived["after"] < 60 and len(outlived["said"].splitlines()) == 1


def test_four_processes(tmp_path):
    results = results_of(4, tmp_path, [0] * 4)
    assert_equal_to_one_process(results)
    assert_heads_move(results)
    cases = {"ring 4/hunyuan_video:t2v/traffic of gna", "ring 2/wan:t2v/gna/dense layer", "ring/gradients"}
    cases |= {"odd heads/gna", "joint/gna", "joint/sla", "gradients of ours", "hunyuan_video:i2v/sla"}
    assert all(cases <= of_process.keys() for of_process in results)


def refusal(transformer, call=None, **config):
    """The message about this transformer under these settings, which need no other process to be refused."""
    parallel = ContextParallelConfig(**config)
    apply_context_parallel(transformer, parallel, transformer._cp_plan or {})
    transformer._parallel_config = ParallelConfig(context_parallel_config=parallel)
    with pytest.raises(dit_accel.DitAccelError) as error, dit_accel.accelerated(transformer, "gna", **WINDOW):
        run(transformer, call)
    return str(error.value)


def test_what_cannot_work_is_refused():
    wan = module("wan")
    assert "dit_accel.parallelize(pipe, ring=2)" in refusal(wan.build(), ring_degree=2)
    assert "3 attention heads, which 2 processes cannot share: pass ulysses_anything" in refusal(
        wan.build(num_attention_heads=3), ulysses_degree=2
    )
    assert "use at most 2 processes" in refusal(wan.build(), ulysses_degree=4, ulysses_anything=True)
    assert "shares 315 tokens among 2 processes" in refusal(wan.build(), wan.inputs(), ulysses_degree=2)
    transformer = wan.build()
    transformer._cp_plan = None
    assert "not by a _cp_plan of its class" in refusal(transformer, ulysses_degree=2)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(dit_accel.DitAccelError, match=names("PixArtTransformer2DModel")):
        dit_accel.parallelize(module("pixart").build())
    with pytest.raises(dit_accel.DitAccelError, match=names("torch.distributed")):
        dit_accel.parallelize(module("wan").build())


def test_shared_tokens_need_an_accelerator():
    """The model's own attention would see the tokens of one process."""
    wan, mesh = module("wan"), types.SimpleNamespace(get_local_rank=lambda: 0, size=lambda: 2)
    transformer = wan.build()
    Shared(mesh, get_families()["wan"].sharding).attach(transformer)
    with pytest.raises(dit_accel.DitAccelError, match=names("accelerate")):
        run(transformer, wan.inputs())


def test_a_plan_of_ones_own_is_refused():
    transformer, parallel = module("wan").build(), ContextParallelConfig(ulysses_degree=2)
    apply_context_parallel(transformer, parallel, {"blocks.0": transformer._cp_plan["blocks.0"]})
    transformer._parallel_config = ParallelConfig(context_parallel_config=parallel)
    with pytest.raises(dit_accel.DitAccelError, match=names("_cp_plan")):
        dit_accel.accelerate(transformer, "gna", **WINDOW)


@pytest.mark.parametrize(("total", "ranks"), [(13, 2), (143, 4), (8, 4), (4, 4), (7, 3)])
def test_shares_are_those_of_diffusers(total, ranks):
    assert even_shares(total, ranks) == tuple(len(share) for share in torch.arange(total).tensor_split(ranks))
