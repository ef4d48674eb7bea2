"""Calibration: settings of each layer from what a model's calls show, by the rule that the method declares.

By recall: the model runs with every pair kept. A head's recall is a mean over sampled queries, denoising steps,
guidance branches and prompts. By loss: settings run in one layer alone, on noisy samples of the prompts. The loss is
that of a layer search, the squared error of the prediction over the mean square of the dense model's; how dense each
layer becomes follows as in a layer search.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dit_accel.accelerator import Accelerator
from dit_accel.errors import DitAccelError
from dit_accel.eval import quality
from dit_accel.eval.attention import QUERIES
from dit_accel.files import read_json, replace_file
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.sampling import TotalBar, progress_bar
from dit_accel.hooks.selfcheck import ComputedAttention, sample
from dit_accel.method import LossCalibration, Method, RecallCalibration
from dit_accel.pipelines.targets import find_transformers
from dit_accel.registry import make_config
from dit_accel.schedule import Schedule
from dit_accel.setting import Setting
from dit_accel.train import search
from dit_accel.tune.request import TuneRequest
from dit_accel.tune.space import DENSE, SAMPLES, LayerSearch

Calibrated = tuple[Setting, str, dict[str, Any]]  # what it says of the shares, and remarks for the file
Curves = Mapping[str, Mapping[str, torch.Tensor | None]]  # by transformer and layer, in the order they run


def run(request: TuneRequest) -> list[str]:
    """Calibrate, write the layer schedule, and return lines that state the result.

    Raises:
        DitAccelError: the request cannot be carried out. Finished runs stay, and the next calibration uses them.
    """
    method, config = request.calibrated()
    by_recall = isinstance(method.calibration, RecallCalibration)
    setting, shares, remarks = (_by_recall if by_recall else _by_loss)(request, method, config)
    assert method.calibration is not None
    configs = [config for row in (setting.layers or {}).values() for config in row]
    line = f"{shares}; {configs.count(None)} of {len(configs)} layers dense"
    return [line, *request.write(method.calibration.file, setting, calibration=remarks)]


def _by_recall(request: TuneRequest, method: Method, config: Mapping[str, Any]) -> Calibrated:
    calibration = method.calibration
    assert isinstance(calibration, RecallCalibration) and request.calibrate is not None
    whole = Setting.make(method.name, {**config, **calibration.whole}, **request.words)
    candidate, record = Candidate(whole), functools.partial(record_recalls, calibration=calibration)
    with quality.opened(request.evaluation(metrics=("psnr",)), [candidate]) as evaluation, progress_bar() as progress:
        sweep, items = evaluation.sweep, evaluation.items
        steps = sweep.steps(candidate) or 1
        bar = TotalBar(progress, "all prompts", steps * len(items))
        recalls = []
        for item in items:
            key, folder = {"queries": QUERIES}, request.output / "recalls"
            recalls.append(sweep.observe(candidate, item, "recall", key, record, folder, bar))
            bar.advance(steps)
        origin = evaluation.origin()
    setting = reaching(_mean(recalls), request.calibrate, method, config, whole.schedule)
    return setting, _spread(setting.configs()), {"recall": request.calibrate, **origin}


def record_recalls(accel: Accelerator, run: Callable[[], Any], *, calibration: RecallCalibration) -> dict[str, Any]:
    """The recalls of one run as plain lists: by transformer and layer, [heads][blocks kept - 1]; None where dense."""
    totals: dict[tuple[str, str], list[torch.Tensor]] = {}

    def note(call: ComputedAttention) -> None:
        total = totals.setdefault((call.transformer, call.layer), [torch.zeros(()), torch.zeros(())])
        queries = sample(call.plan.grid.visual, QUERIES).to(call.q.device)
        total[0], total[1] = total[0] + calibration.curve(call, queries).cpu(), total[1] + 1

    with accel.watch(note):
        run()
    recalls: dict[str, Any] = {}
    for layer in accel.report().layers:
        total = totals.get((layer.transformer, layer.name))
        curve = None if total is None else [[round(x, 7) for x in head] for head in (total[0] / total[1]).tolist()]
        recalls.setdefault(layer.transformer, {})[layer.name] = curve
    return recalls


def _mean(runs: list[dict[str, Any]]) -> Curves:
    """The mean of several runs' recalls, of equal weight."""
    return {
        transformer: {
            name: None if curve is None else torch.tensor([one[transformer][name] for one in runs]).double().mean(0)
            for name, curve in layers.items()
        }
        for transformer, layers in runs[0].items()
    }


def reaching(curves: Curves, recall: float, method: Method, config: Mapping[str, Any], schedule: Schedule) -> Setting:
    """The layer schedule that reaches a recall.

    Args:
        curves: float64 [heads, numbers] of each layer; None is dense.
        config: other settings of the method.
        schedule: its dense steps are the file's.
    """
    calibration = method.calibration
    assert isinstance(calibration, RecallCalibration)
    layers: dict[str, tuple[Any, ...]] = {}
    for transformer, of_layers in curves.items():
        row = [None if curve is None else calibration.settings(curve, recall) for curve in of_layers.values()]
        layers[transformer] = tuple(
            None if settings is None else make_config(method.name, {**config, **settings}) for settings in row
        )
    return Setting(method.name, layers=layers, schedule=dataclasses.replace(schedule, dense_layers=0))


def _by_loss(request: TuneRequest, method: Method, config: Mapping[str, Any]) -> Calibrated:
    calibration = method.calibration
    assert isinstance(calibration, LossCalibration) and request.calibrate is not None and not config
    with quality.opened(request.evaluation(metrics=("psnr",)), [DENSE]) as evaluation, progress_bar() as progress:
        pipe: Any = evaluation.sweep.pipe
        steps = evaluation.sweep.steps(DENSE) or 1
        transformers = find_transformers(pipe)[0].values()
        counts = [family.heads(layer) for module, family in transformers for _, layer in family.attentions(module)]
        layer_search = LayerSearch(request, evaluation, [], steps, len(counts))
        obstacle = layer_search.obstacle
        if obstacle is not None or len(set(counts)) != 1 or counts[0] == 1:
            numbers = f"its layers have {', '.join(map(str, sorted(set(counts))))} heads, not one number of several"
            raise DitAccelError(f"{request.model} cannot be calibrated: {obstacle or numbers}.")
        heads = counts[0]
        folder = layer_search.folder(method.name, [])
        path = folder / "losses.json"
        if not path.exists():
            work = SAMPLES * calibration.calls(heads)
            bar = TotalBar(progress, "all layers", SAMPLES * steps + work * len(counts))
            probe = search.Probe(pipe, method.name, layer_search.data(folder, bar), SAMPLES)
            measured = []
            for layer in range(probe.layers):
                measured.append(calibration.measure(heads, functools.partial(_loss, probe, layer)))
                bar.advance(work)
            replace_file(path, json.dumps({"layers": measured}, allow_nan=False).encode())
        records = read_json(path, "table of losses", "Delete it and run again.", ("layers",))["layers"]
        origin = evaluation.origin()
    layers, density = cheapest(records, heads, request.calibrate, method)
    setting = Setting(method.name, layers={"transformer": layers}, schedule=request.schedule)
    return setting, f"{density:.3f} of all heads kept", {"share": request.calibrate, **origin, "losses": records}


def _loss(probe: search.Probe, layer: int, config: Any) -> float:
    return probe.measure(layer, config)[0]


def cheapest(records: list[Any], heads: int, density: float, method: Method) -> tuple[tuple[Any | None, ...], float]:
    """The Config of each layer, None for dense, and their mean density: the least total loss at `density` at most.

    Args:
        records: of the layers, as `LossCalibration.measure` returns them.

    Raises:
        DitAccelError: no choice is so sparse.
    """
    calibration = method.calibration
    assert isinstance(calibration, LossCalibration)
    rows = [calibration.choices(record, heads) for record in records]
    densities, losses = tuple(cost for _, cost, _ in rows[0]), tuple(tuple(loss for *_, loss in row) for row in rows)
    table = search.Table(method.name, tuple(range(len(densities))), densities, losses)
    indices = search.budgeted(table, density)
    configs = tuple(None if index is None else row[index][0] for row, index in zip(rows, indices, strict=True))
    return configs, table.cost(indices)


def _spread(configs: list[Any]) -> str:
    shares = [share for config in configs for share in config.budgets]
    if not shares:
        return "every head needs all blocks"
    spread = f"{sum(shares) / len(shares):.3f} on average, {min(shares):.3f} to {max(shares):.3f}"
    return f"share of the key blocks, by head: {spread}"
