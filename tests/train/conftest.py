"""The demo's pipeline, small and untrained, clips it can be trained on, and runs of a few steps."""

import dataclasses

import pytest
import torch

SIZE = {"num_frames": 5, "height": 32, "width": 48}  # 3 x 4 x 6 = 72 tokens


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A saved pipeline and prepared data for it."""

    model: object
    data: object

    def load(self):
        from dit_accel.pipelines.demo import load_demo

        pipe = load_demo(folder=self.model)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The same weights and data for every test; tests do not write to them."""
    from dit_accel.train import data, prepare
    from tools.demo.model import build_pipeline

    torch.manual_seed(0)
    pipe = build_pipeline(dim=64, layers=2, ffn_dim=64)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.05)
    for block in pipe.transformer.blocks:  # so that leaving attention out makes a difference
        block.attn1.to_out[0].weight.data *= 8
    root = tmp_path_factory.mktemp("tiny")
    pipe.save_pretrained(root / "model")
    folders = Tiny(root / "model", root / "data")
    preparer = prepare.Preparer(folders.load(), SIZE)
    clips = preparer.encoded(prepare.demo_clips(7, SIZE, seed=0))
    data.write(folders.data, clips, preparer.conditioning("")[0], {"source": "clips", **SIZE})
    return folders


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Every run has accelerate's process-wide state to itself."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# What a run of the tiny pipeline has unless a test says otherwise.
SETTINGS = {"method": "gna", "config": {"window": 3}, "objectives": {"teacher": 1.0}, "steps": 4, "rank": 4}
SETTINGS |= {"rate": 1e-2, "batch": 2, "save_every": 2}


@pytest.fixture
def trained(tiny, tmp_path):
    """Trains the tiny pipeline with these settings into a folder of that name; the folder.

    `moved`, a seed, moves every weight at the start to one of its two neighbours in float32.
    """
    from dit_accel.train.card import Base
    from dit_accel.train.data import Dataset
    from dit_accel.train.loop import Trainer
    from dit_accel.train.settings import make

    def run(name="run", call=None, validation=None, moved=None, **settings):
        output, base = tmp_path / name, Base("tiny", licence="apache-2.0")
        pipe = tiny.load()
        if moved is not None:
            generator = torch.Generator().manual_seed(moved)
            for weight in pipe.transformer.parameters():
                up = torch.rand(weight.shape, generator=generator) < 0.5
                weight.data = torch.nextafter(weight.data, torch.where(up, torch.inf, -torch.inf))
        trainer = Trainer(pipe, make(SETTINGS | settings), Dataset(tiny.data), output, base, validation)
        trainer.run()
        trainer.export(call or {})
        return output

    return run


@pytest.fixture
def elsewhere(tiny, tmp_path, root):
    """Starts the same in another process, `launcher` in front of the program; runs are settings by folder name.

    With `dies` the process is killed before it names something so; see `kills.die_before`. With `shards`, by FSDP 2.
    """
    import json
    import os
    import pathlib
    import subprocess
    import sys

    import kills

    def start(runs, launcher=(), dies=None, shards=False, **variables):
        job = {"model": str(tiny.model), "data": str(tiny.data), "shards": shards}
        job["dies"] = None if dies is None else [str(tmp_path), 1, dies]
        job["runs"] = {str(tmp_path / name): SETTINGS | settings for name, settings in runs.items()}
        worker = pathlib.Path(__file__).with_name("worker.py")
        path = os.pathsep.join((str(root), kills.TESTS))
        return subprocess.Popen(
            [sys.executable, *launcher, str(worker), json.dumps(job)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
