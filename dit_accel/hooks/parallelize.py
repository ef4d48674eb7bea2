"""Several processes for one sequence, by one call: `parallelize`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.context_parallel import config_of
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.sharding import Sharding, Shared
from dit_accel.pipelines.targets import find_transformers


def parallelize(target: Any, ulysses: int | None = None, ring: int = 1) -> None:
    """Share the tokens of every sample among processes, for a model that `accelerate` runs before or after this call.

    Each process calls this, and then the pipeline with the same arguments and an equally seeded generator. All get the
    whole result. Numbers of tokens and heads need not divide by the number of processes.

    Args:
        target: a Diffusers pipeline, an object with a transformer, or a transformer, on its device.
        ulysses: processes that share the heads of a range; all that `torch.distributed` has, over `ring`, if None.
            Ulysses: DeepSpeed, arXiv:2309.14509.
        ring: ranges of the sequence, each held by `ulysses` processes. Static methods run in a ring; see
            `pipelines.ring`. 1: Ulysses alone.

    Raises:
        DitAccelError: `torch.distributed` is not set up, has another number of processes, or a transformer cannot be
            shared.
    """
    import torch.distributed as dist

    shardings = [
        (transformer, _sharding(transformer, family)) for transformer, family in find_transformers(target)[0].values()
    ]
    if not (dist.is_available() and dist.is_initialized()):
        raise DitAccelError(
            "parallelize() needs several processes and found torch.distributed not set up: start the program with "
            "torchrun, and call torch.distributed.init_process_group() first."
        )
    ranks = dist.get_world_size()
    if ring < 1 or ranks < 2 or ulysses not in (None, ranks / ring) or ranks % ring:
        raise DitAccelError(
            f"parallelize() shares a sample among all processes, of which there are {ranks}; got ulysses={ulysses} and "
            f"ring={ring}. Start as many as ulysses times ring with torchrun --nproc-per-node, two at least."
        )
    for transformer, sharding in shardings:
        _share(transformer, sharding, ranks // ring, ring)


def _sharding(transformer: nn.Module, family: Family) -> Sharding:
    name = type(transformer).__name__
    if config_of(transformer) is not None:
        raise DitAccelError(f"{name} runs with context parallelism already; call parallelize() or Diffusers', once.")
    sharding = family.sharding_of(transformer)
    if sharding is None:
        raise DitAccelError(
            f"No sharding of {name} is known: neither the family {family.name} nor Diffusers says which of its tensors "
            "hold tokens. Run one process, or several on different prompts."
        )
    return sharding


def _share(transformer: Any, sharding: Sharding, ulysses: int, ring: int) -> None:
    """What `enable_parallelism` does, which fails on a CPU, with hooks that also share what Diffusers' cannot."""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig, ParallelConfig

    device = next(transformer.parameters()).device
    config = ContextParallelConfig(
        ring_degree=ring, ulysses_degree=ulysses, ulysses_anything=ring == 1, ring_anything=ulysses == 1
    )
    mesh = dist.init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), ulysses * ring, torch.device(device.type), mesh=mesh)
    Shared(config._flattened_mesh, sharding).attach(transformer)
    transformer._parallel_config = parallel
