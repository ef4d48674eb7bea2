"""Runs trainings in a process of its own: `python worker.py '{"model":, "data":, "dies":, "runs": {}}'`."""

import json
import pathlib
import sys

import kills

from dit_accel.pipelines.demo import load_demo
from dit_accel.train import loop, state
from dit_accel.train.card import Base
from dit_accel.train.data import Dataset
from dit_accel.train.loop import Trainer
from dit_accel.train.settings import make


def sharding(join):
    """`join` for FSDP 2 with gloo: accelerate's own choice of it asks for a GPU, its preparation does not."""

    def joined(*arguments):
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        hf = join(*arguments)
        wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["WanTransformerBlock"]}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **wrap)
        hf.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        return hf

    return joined


def main(job):
    if job["dies"] is not None:
        kills.die_before(*job["dies"])
    if job["shards"]:
        loop.join = sharding(loop.join)
    for folder, settings in job["runs"].items():
        data = Dataset(pathlib.Path(job["data"]))
        pipe = load_demo(folder=pathlib.Path(job["model"]))
        trainer = Trainer(pipe, make(settings), data, pathlib.Path(folder), Base("tiny"), None)
        assert any(isinstance(weight, state.DTensor) for weight in trainer.weights.values()) == job["shards"]
        trainer.run()
        kernels = {kernel for layer in trainer.accel.report().layers for kernel in layer.kernels}
        assert settings.get("impl", "auto") in {"auto", *kernels}
        trainer.export({})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
