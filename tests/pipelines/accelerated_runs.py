"""Tiny models with every method, for tests of what acceleration goes together with."""

import copy

import pytest
import torch
from tiny_models import all_models, run

import dit_accel

SLA = ("sla", {"topk": 0.35, "block": 16})
ROUTED = (
    ("sparge", {"topk": 0.3, "topp": 0.1, "block_q": 16, "block": 16, "order": "hilbert"}),
    ("sol", {"block": 8, "block_q": 8}),
    ("rectified", {"block": 8, "block_q": 8, "topp": 0.0}),
)
VIDEO = (("gna", {"window": (3, 5, 4)}), ("radial", {"decay": 0.2, "sink": False}), ("tile", {"references": 1}), SLA)
IMAGE = (("gna", {"window": (1, 5, 4)}), SLA)
FIRST = list({tiny.family: tiny for tiny in reversed(all_models())}.values())[::-1]
GRADED = ("wan:t2v", "flux:t2i", "qwen_image:t2i", "hunyuan_video:t2v")
UNTUNED = (*GRADED, "cogvideox:1.0")  # models that run the methods without fine-tuning


def settings(tiny):
    return (*(VIDEO if tiny.video else IMAGE), *(ROUTED if str(tiny) in UNTUNED else ()))


def each_run(models=FIRST):
    """Every method of these models."""
    runs = [(tiny, method, config) for tiny in models for method, config in settings(tiny)]
    return pytest.mark.parametrize(("tiny", "method", "config"), in_turn(runs, lambda tiny, method, config: method))


def in_turn(runs, name):
    """Parameters (tiny, ...) of a check, of which CI runs one a model, another one for the next model.

    Of models that run the methods without fine-tuning CI runs every second one. The others are marked thorough.

    Args:
        name: makes a text of the parameters, for their ids.
    """
    by_model, parameters = {}, []
    for values in runs:
        by_model.setdefault(str(values[0]), []).append(values)
    for index, (model, some) in enumerate(by_model.items()):
        for turn, values in enumerate(some):
            spared = (turn + index) % 2 if model in UNTUNED else turn != index % len(some)
            marks = [pytest.mark.thorough] if spared else []
            parameters.append(pytest.param(*values, id=f"{model}-{name(*values)}", marks=marks))
    return parameters


def train(accel):
    """Give learned weights some value: at zero, nobody would see them."""
    generator = torch.Generator().manual_seed(3)
    for module in accel.learned_weights().values():
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)


def accelerated(transformer, inputs, method, config, **arguments):
    """Output and report."""
    with dit_accel.accelerated(transformer, method, **config, **arguments) as accel:
        train(accel)
        return run(transformer, inputs), accel.report()


def plain_and_exact(transformer, tiny, method, config):
    double = copy.deepcopy(transformer).double()
    plain, _ = accelerated(transformer, tiny.call(), method, config)
    exact, _ = accelerated(double, tiny.call(dtype=torch.float64), method, config)
    return plain, exact


def each_graded():
    """One method of each representative model, another one for each.

    Without text, with text first, with masked text in the middle, with masked text last.
    """
    chosen = [tiny for tiny in all_models() if str(tiny) in GRADED]
    runs = [pytest.param(tiny, *settings(tiny)[i % len(settings(tiny))], id=str(tiny)) for i, tiny in enumerate(chosen)]
    return pytest.mark.parametrize(("tiny", "method", "config"), runs)
