"""Runs trainings in a process of its own: `python worker.py '{"model":, "data":, "dies":, "runs": {}}'`."""

import json
import pathlib
import sys

import kills

from dit_accel.pipelines.demo import load_demo
from dit_accel.train.card import Base
from dit_accel.train.data import Dataset
from dit_accel.train.loop import Trainer
from dit_accel.train.settings import make


def main(asked):
    if asked["dies"] is not None:
        kills.die_before(*asked["dies"])
    for folder, settings in asked["runs"].items():
        data = Dataset(pathlib.Path(asked["data"]))
        pipe = load_demo(folder=pathlib.Path(asked["model"]))
        trainer = Trainer(pipe, make(settings), data, pathlib.Path(folder), Base("tiny"), None)
        trainer.run()
        kernels = {kernel for layer in trainer.accel.report().layers for kernel in layer.kernels}
        assert settings.get("impl", "auto") in {"auto", *kernels}
        trainer.export({})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
