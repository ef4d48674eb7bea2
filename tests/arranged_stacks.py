"""Small transformers of the families whose tokens are permuted once a run of layers, and their calls."""

import pytest
import torch
from tiny_models import get, module, run
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel

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
    "chronoedit": lambda: module("wan").build_chronoedit(layers=4),
    "hunyuan_video": lambda: module("hunyuan_video").build(num_layers=2, num_single_layers=2),
    "ltx": lambda: module("ltx").build(num_layers=4),
    "minimax_h3": lambda: module("minimax_h3").build(num_layers=4),
}
TINY = {
    "wan": ("wan", "t2v"),
    "chronoedit": ("wan", "chronoedit"),
    "hunyuan_video": ("hunyuan_video", "t2v"),
    "ltx": ("ltx", "t2v"),
    "minimax_h3": ("minimax_h3", "ref2va"),
}
over_families = pytest.mark.parametrize("family", BUILD)


def call_of(family, step=0):
    call = get(*TINY[family]).call()
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


def accelerated(transformer, call):
    """The output of `sol`, and where tokens were permuted."""
    with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
        return run(transformer, call), set().union(*where(accel))


class Gathers(TorchDispatchMode):
    """The shapes of which rows were taken by one index for all samples."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.shapes = tokens, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default and self.tokens & set(args[0].shape):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))
