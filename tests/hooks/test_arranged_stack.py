"""Tokens permuted once before a run of sparse layers, against permuting q, k and v in each layer."""

import accelerate
import pytest
import torch
from accelerated_runs import train
from accelerated_state import state_of
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from peft import LoraConfig
from tiny_models import get, module, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel.hooks.arranged_stack import ArrangedStack

# 315 visual tokens, of which no block size is a divisor
SETTINGS = {
    "sol": {"block": 16, "block_q": 16, "order": "morton", "tail": "hybrid"},
    "sparge": {"topk": 0.3, "topp": 0.1, "block": 16, "block_q": 16, "order": "hilbert"},
    "rectified": {"block": 16, "block_q": 16, "topp": 0.0, "order": "hilbert"},
    "proxy": {"block": 16, "order": "morton"},  # with a gate of the queries
}
SOL = SETTINGS["sol"]
BUILD = {
    "wan": lambda: module("wan").build(layers=4),
    "hunyuan_video": lambda: module("hunyuan_video").build(num_layers=2, num_single_layers=2),
    "ltx": lambda: module("ltx").build(num_layers=4),
    "minimax_h3": lambda: module("minimax_h3").build(num_layers=4),
}
FIRST = {"wan": "t2v", "hunyuan_video": "t2v", "ltx": "t2v", "minimax_h3": "ref2va"}
over_families = pytest.mark.parametrize("family", BUILD)


@pytest.fixture
def in_each_layer(monkeypatch):
    """A function's result as it is, and with every layer permuting its own tokens."""

    def both(work):
        arranged = work()
        with monkeypatch.context() as patch:
            patch.setattr(ArrangedStack, "begin", lambda *arguments: None)
            return arranged, work()

    return both


class Gathers(TorchDispatchMode):
    """The shapes of which rows were taken by one index for all samples."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.shapes = tokens, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default and self.tokens & set(args[0].shape):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def call_of(family, step=0):
    call = get(family, FIRST[family]).call()
    return call | {"hidden_states": call["hidden_states"] * (1 + step / 20)}


def of_steps(family, accel, transformer, steps=6):
    """Outputs of a run of so many steps."""
    outputs = []
    for step in range(steps):
        accel.set_step(step, steps)
        outputs.append(run(transformer, call_of(family, step)))
    return torch.stack(outputs)


def where(accel):
    """Where the tokens of each layer were permuted."""
    return [set(layer.permuted) for layer in accel.report().layers]


@pytest.mark.parametrize("method", SETTINGS)
@over_families
def test_bits_are_those_of_layers_that_permute(family, method, in_each_layer):
    transformer, call = BUILD[family](), call_of(family)
    ways = []

    def work():
        with dit_accel.accelerated(transformer, method, **SETTINGS[method]) as accel:
            train(accel)
            ways.append((run(transformer, call), where(accel)))
            return ways[-1][0]

    assert torch.equal(*in_each_layer(work))
    assert [way for _, way in ways] == [[{"stack"}] * 4, [{"layer"}] * 4]
    with dit_accel.accelerated(transformer, method, **SETTINGS[method] | {"order": "raster"}) as accel:
        assert not torch.equal(run(transformer, call), ways[0][0])
        assert where(accel) == [set()] * 4


# tensors of a call with a row for each token: rotary tables, and MiniMax-H3's noise levels
BY_TOKEN = {"wan": 2, "hunyuan_video": 2, "ltx": 2, "minimax_h3": 3}


@over_families
def test_gathers_of_a_call(family, in_each_layer):
    """The visual stream there and back, and each tensor with a row for each token once; not four in each layer."""
    transformer, call = BUILD[family](), call_of(family)
    grid = get(family, FIRST[family]).grid

    def work():
        with dit_accel.accelerated(transformer, "sol", **SOL), Gathers({grid.tokens, grid.visual}) as gathers:
            run(transformer, call)
        return len(gathers.shapes)

    arranged, in_layers = in_each_layer(work)
    assert in_layers - arranged == 4 * 4 - (2 + BY_TOKEN[family])


def test_dense_layers_are_in_no_run(in_each_layer):
    """Layer 2 is dense: two runs. The model's own code sees its tokens in its own order."""
    transformer, call = module("wan").build(layers=5), call_of("wan")
    seen = []
    transformer.blocks[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))

    def work():
        with (
            dit_accel.accelerated(transformer, "sol", dense_layers=(2,), **SOL) as accel,
            Gathers({315}) as gathers,
        ):
            out = run(transformer, call)
        ways.append(where(accel))
        counts.append(len(gathers.shapes))
        return out

    ways, counts = [], []
    assert torch.equal(*in_each_layer(work)) and torch.equal(*seen)
    assert ways[0] == [{"stack"}, {"stack"}, set(), {"stack"}, {"stack"}]
    assert counts == [2 * (2 + 2), 4 * 4]


def test_layers_with_different_curves_and_methods(in_each_layer):
    transformer, call = module("wan").build(layers=6), call_of("wan")
    setting = dit_accel.Setting.make("sol", SOL)
    layers = [{"order": order} for order in ("morton", "morton", "hilbert", "raster", "hilbert", "hilbert")]
    record = setting.as_dict()
    record.pop("config")
    record["layers"] = {"transformer": [SOL | layer for layer in layers]}
    setting = dit_accel.Setting.from_dict(record)
    ways = []

    def work():
        with dit_accel.accelerated(transformer, setting) as accel:
            out = run(transformer, call)
            ways.append(where(accel))
        return out

    assert torch.equal(*in_each_layer(work))
    assert ways[0] == [{"stack"}] * 3 + [set()] + [{"stack"}] * 2


def test_dense_steps_and_paused_runs_are_the_models_own(in_each_layer):
    transformer, tiny = module("wan").build(layers=4), get("wan", "t2v")
    plain = run(transformer, tiny.call())
    before = state_of(transformer)
    accel = dit_accel.accelerate(transformer, "sol", dense_steps=1, **SOL)
    with Gathers({315}) as gathers:
        accel.set_step(0, 3)
        assert torch.equal(run(transformer, tiny.call()), plain)
        assert not gathers.shapes
        accel.set_step(1, 3)
        sparse = run(transformer, tiny.call())
        assert len(gathers.shapes) == 4 and not torch.equal(sparse, plain)
        with accel.paused():
            assert torch.equal(run(transformer, tiny.call()), plain)
        accel.set_step(0, 3)
        assert torch.equal(run(transformer, tiny.call()), plain)
        assert len(gathers.shapes) == 4
    accel.remove()
    assert state_of(transformer) == before and torch.equal(run(transformer, tiny.call()), plain)


@pytest.mark.parametrize("schedule", [{"dense_steps": 1}, {"dense_steps": 1, "dense_last_steps": 2}], ids=str)
@pytest.mark.parametrize("cache", ["first-block", "mag:threshold=0.05,mag_ratios=0.98"])
@over_families
def test_step_caches(family, cache, schedule, in_each_layer):
    """What they keep is in the model's order: dense steps may use what sparse ones left, and the other way."""
    threshold = 0.04 if family == "minimax_h3" else 0.02  # skips some steps and computes others
    cache = f"first-block:threshold={threshold}" if cache == "first-block" else cache
    check_cache(family, cache, schedule, in_each_layer)


@pytest.mark.parametrize("cache", ["taylorseer:cache_interval=2,disable_cache_before_step=2", "steps:computed=0x1x3"])
def test_further_step_caches(cache, in_each_layer):
    check_cache("wan", cache, {"dense_steps": 1, "dense_last_steps": 2}, in_each_layer)


def check_cache(family, cache, schedule, in_each_layer):
    transformer = BUILD[family]()
    ways = []

    def work():
        with dit_accel.accelerated(transformer, "sol", cache=cache, dense_layers=0, **schedule, **SOL) as accel:
            outputs = of_steps(family, accel, transformer)
            assert 0 < accel.report().cache.skipped < 6
            ways.append(where(accel))
        return outputs

    assert torch.equal(*in_each_layer(work))
    assert ways == [[{"layer"}, {"stack"}, {"stack"}, {"layer"}], [{"layer"}] * 4]


@pytest.mark.parametrize("name", ["wan:vace", "wan:animate", "hunyuan_video:i2v", "ltx:condition", "cogvideox:1.0"])
def test_where_layers_permute_their_own(name, in_each_layer):
    tiny = get(*name.split(":"))
    transformer, ways = tiny.build(), []

    def work():
        with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
            out = run(transformer, tiny.call())
            ways.append({place for layer in where(accel) for place in layer})
            notes = [note for note in accel.report().notes if "permuted" in note]
        return out, notes

    (out, notes), (other, _) = in_each_layer(work)
    assert torch.equal(out, other) and ways == [{"layer"}, {"layer"}] and len(notes) == 1


def test_a_cache_that_keeps_what_attention_returns(in_each_layer):
    """In dense steps it may return what a sparse step left, so both are in the model's order."""
    transformer, ways = BUILD["hunyuan_video"](), []
    cache = "taylorseer:cache_interval=2,disable_cache_before_step=2,use_lite_mode=false"

    def work():
        schedule = {"dense_steps": 1, "dense_last_steps": 2}
        with dit_accel.accelerated(transformer, "sol", cache=cache, **schedule, **SOL) as accel:
            outputs = of_steps("hunyuan_video", accel, transformer)
            ways.append(where(accel))
            assert accel.report().cache.skipped
        return outputs

    assert torch.equal(*in_each_layer(work)) and ways[0] == [{"layer"}] * 4


def test_a_cache_of_the_users():
    transformer = module("wan").build(layers=4)
    with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
        transformer.enable_cache(FirstBlockCacheConfig(0.1))
        with transformer.cache_context("cond"):
            run(transformer, call_of("wan"))
        transformer.disable_cache()
        assert where(accel) == [{"layer"}] * 4
        run(transformer, call_of("wan"))
        assert where(accel) == [{"layer", "stack"}] * 4


def test_a_timestep_for_each_token(in_each_layer):
    """Wan 2.2's TI2V: the modulation has a row for each token."""
    transformer, call = module("wan").build(layers=3), call_of("wan")
    times = torch.full((2, 315), 500)
    times[:, :63] = 0
    (out, ways), (other, _) = in_each_layer(lambda: accelerated(transformer, call | {"timestep": times}))
    assert torch.equal(out, other) and ways == {"stack"}
    assert not torch.equal(out, accelerated(transformer, call)[0])


def test_a_timestep_for_each_token_of_ltx(in_each_layer):
    transformer, call = BUILD["ltx"](), call_of("ltx")
    times = torch.full((2, 315), 500.0)
    times[:, :63] = 0
    (out, ways), (other, _) = in_each_layer(lambda: accelerated(transformer, call | {"timestep": times}))
    assert torch.equal(out, other) and ways == {"stack"}
    assert not torch.equal(out, accelerated(transformer, call)[0])


def accelerated(transformer, call):
    with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
        return run(transformer, call), set().union(*where(accel))


def grads_of(transformer, family):
    """Gradients of all weights."""
    transformer.zero_grad()
    transformer(**call_of(family), return_dict=False)[0].square().mean().backward()
    return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@over_families
def test_gradients(family, checkpointing, in_each_layer):
    """Sums over tokens are in another order: as far from float64 as before, but for rounding."""
    transformer = BUILD[family]().train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()

    def work():
        with dit_accel.accelerated(transformer, "sol", **SOL):
            return grads_of(transformer, family)

    ours, present = in_each_layer(work)
    assert ours.keys() == present.keys() and any("to_k" in name for name in ours)
    for name, gradient in ours.items():
        # a sum over at most 2 x 489 tokens in another order
        bound = 1000 * torch.finfo(torch.float32).eps * present[name].abs().max()
        assert (gradient - present[name]).abs().max() <= bound, name


def test_watchers_and_verification_see_the_models_order(in_each_layer):
    transformer, call = module("wan").build(layers=3), call_of("wan")

    def work():
        calls = []
        with dit_accel.accelerated(transformer, "sol", verify="first-call", **SOL) as accel:
            with accel.watch(calls.append):
                run(transformer, call)
            layers = accel.report().layers
        seen = [torch.cat((each.q, each.k, each.v, each.out)) for each in calls]
        return torch.stack(seen), [(layer.relative_error, layer.kept_mass) for layer in layers]

    (seen, measured), (expected, others) = in_each_layer(work)
    assert torch.equal(seen, expected) and measured == others


def test_a_layer_that_becomes_dense_in_the_call(in_each_layer):
    """Its own attention sees permuted tokens in that call, and the model's order from the next one on."""
    transformer, call = module("wan").build(layers=3), call_of("wan")

    def work():
        with dit_accel.accelerated(
            transformer, "sol", verify="first-call", keep_dense_above=1e-6, **SOL | {"tau": 3.0, "tail": "none"}
        ) as accel:
            outputs = torch.stack([run(transformer, call) for _ in range(2)])
            assert {layer.dense_calls for layer in accel.report().layers} == {2}
        return outputs

    ours, _ = in_each_layer(work)
    plain = run(transformer, call)
    assert torch.equal(ours[1], plain)
    torch.testing.assert_close(ours[0], plain, rtol=1e-4, atol=1e-5)


def test_adapters_and_offloading(tmp_path):
    plain, _ = accelerated(module("wan").build(layers=3), call_of("wan"))

    def offload(transformer):
        accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))

    def by_group(transformer):
        cpu = torch.device("cpu")
        apply_group_offloading(
            transformer, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path),
        )  # fmt: skip

    for change in (offload, by_group):
        for after in (False, True):
            transformer = module("wan").build(layers=3)
            if not after:
                change(transformer)
            with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
                if after:
                    change(transformer)
                assert torch.equal(run(transformer, call_of("wan")), plain)
                assert where(accel) == [{"stack"}] * 3


def test_an_adapter(in_each_layer):
    transformer = module("wan").build(layers=3)
    torch.manual_seed(5)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "ffn.net.2"], init_lora_weights=False))
    (out, ways), (other, _) = in_each_layer(lambda: accelerated(transformer, call_of("wan")))
    assert torch.equal(out, other) and ways == {"stack"}


def test_lists_that_are_kept_between_steps(in_each_layer):
    transformer = module("wan").build(layers=3)

    def work():
        with dit_accel.accelerated(transformer, "sparge", refresh=2, dense_steps=1, **SETTINGS["sparge"]) as accel:
            outputs = of_steps("wan", accel, transformer)
            return outputs, [layer.density for layer in accel.report().layers]

    (out, density), (other, expected) = in_each_layer(work)
    assert torch.equal(out, other) and density == expected


@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_compiled(part):
    """One graph, and one for dense steps. Blocks that are compiled one by one share theirs, so layers permute."""
    transformer = module("wan").build(layers=4)
    counter = CompileCounterWithBackend("aot_eager")
    with dit_accel.accelerated(transformer, "sol", dense_steps=1, **SOL) as accel:
        eager = of_steps("wan", accel, transformer, 3)
        compiled = transformer
        if part == "whole":
            compiled = torch.compile(transformer, backend=counter, fullgraph=True)
        else:
            transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(of_steps("wan", accel, compiled, 3), eager)
        places = {"stack"} if part == "whole" else {"stack", "layer"}  # the eager run's too
        assert counter.frame_count == 2
        assert where(accel) == [places] * 4
    plain = run(compiled, call_of("wan"))
    transformer._compiled_call_impl = None
    torch.testing.assert_close(plain, run(module("wan").build(layers=4), call_of("wan")))


@pytest.fixture
def wan_pipe():
    """Wan 2.2 with two transformers; guidance calls each twice a step."""
    models = {"transformer": module("wan").build(layers=3), "transformer_2": module("wan").build(layers=4)}
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.8, **models,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe):
    text = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], height=80, width=112, num_frames=9,
        num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames  # fmt: skip


@pytest.mark.parametrize(
    ("cache", "place"),
    [
        (None, "stack"),
        ("mag:threshold=0.05,mag_ratios=0.98", "stack"),
        ("pab:spatial_attention_block_skip_range=2,spatial_attention_timestep_skip_range=-1x1001", "layer"),
    ],
)
def test_a_pipeline_with_two_transformers(cache, place, wan_pipe, in_each_layer):
    reports = []

    def work():
        with dit_accel.accelerated(wan_pipe, "sol", cache=cache, dense_steps=1, **SOL) as accel:
            frames = generate(wan_pipe)
            reports.append((accel.report(), where(accel)))
        return frames

    assert torch.equal(*in_each_layer(work))
    report, ways = reports[0]
    inner = [way for number, way in enumerate(ways) if cache is None or number in (1, 4, 5)]
    assert all(way == {place} for way in inner)
    notes = [note for note in report.notes if "permuted" in note]
    assert len(notes) == (1 if place == "layer" else 0)
    assert cache is None or report.cache.skipped
