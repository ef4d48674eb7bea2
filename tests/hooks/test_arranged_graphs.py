"""Tokens along a curve beside graphs, adapters and offloading."""

import accelerate
import pytest
import torch
from arranged_stacks import SOL, accelerated, call_of, of_steps, where
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny_models import module, run
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel


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


@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_compiled(part):
    """One graph, and one for dense steps. Blocks that are compiled one by one share theirs, so layers permute."""
    layers = 3 if part == "whole" else 4
    transformer = module("wan").build(layers=layers)
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
        assert where(accel) == [places] * layers
    plain = run(compiled, call_of("wan"))
    transformer._compiled_call_impl = None
    torch.testing.assert_close(plain, run(module("wan").build(layers=layers), call_of("wan")))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_serves_every_grid(strict):
    """Another grid with as many tokens: rows in the graph would be those of the first."""
    transformer, call = module("wan").build(layers=3), call_of("wan") | {"return_dict": False}
    auto = torch.export.Dim.AUTO
    shapes = dict.fromkeys(call) | {"hidden_states": {3: auto, 4: auto}}
    upright = call | {"hidden_states": call["hidden_states"].transpose(3, 4).contiguous()}
    with torch.no_grad(), dit_accel.accelerated(transformer, "sol", **SOL) as accel:
        for exported in (call, upright):
            eager = transformer(**exported)[0]
            if exported is call:
                graph = torch.export.export(transformer, (), call, dynamic_shapes=shapes, strict=strict).module()
            torch.testing.assert_close(graph(**exported)[0], eager)
        assert where(accel) == [{"stack"}] * 3  # of the eager calls
