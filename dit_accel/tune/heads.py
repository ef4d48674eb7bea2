"""Calibration of `heads`: which heads of each layer a model misses least.

The loss of skipping heads of a layer is that of a layer search: the squared error of the prediction over the mean
square of the dense model's, with the other layers dense, averaged over noisy samples of the prompts. First each head is
skipped alone. Then a layer's heads are skipped together, the least missed first: heads stand in for each other, so
their losses do not add up. How many heads each layer loses follows as in a layer search.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.eval import quality
from dit_accel.files import read_json, replace_file
from dit_accel.generation.sampling import TotalBar, progress_bar
from dit_accel.methods.heads import Config
from dit_accel.pipelines.targets import find_transformers
from dit_accel.setting import Setting
from dit_accel.train import search
from dit_accel.tune.request import TuneRequest
from dit_accel.tune.space import DENSE, SAMPLES, LayerSearch

FILE = "heads.json"
Ranked = tuple[list[int], list[float]]  # heads, the least missed first; the loss without the first, the first two, ...


def run(request: TuneRequest) -> list[str]:
    """As `calibrate.run`; layers that differ in their number of heads are refused."""
    assert request.calibrate is not None
    with quality.opened(request.evaluation(metrics=("psnr",)), [DENSE]) as opened, progress_bar() as progress:
        pipe: Any = opened.sweep.pipe
        steps = opened.sweep.steps(DENSE) or 1
        transformers = find_transformers(pipe)[0].values()
        found = [family.heads(layer) for module, family in transformers for _, layer in family.attentions(module)]
        counts = set(found)
        layer_search = LayerSearch(request, opened, [], steps, len(found))
        obstacle = layer_search.obstacle
        if obstacle is not None or len(counts) != 1 or counts == {1}:
            numbers = f"its layers have {', '.join(map(str, sorted(counts)))} heads, not one number of several"
            raise DitAccelError(f"Heads of {request.model} cannot be calibrated: {obstacle or numbers}.")
        (heads,) = counts
        folder = layer_search.folder("heads", [])
        path = folder / "losses.json"
        if not path.exists():
            work = SAMPLES * (2 * heads - 2)
            whole = TotalBar(progress, "all layers", SAMPLES * steps + work * len(found))
            data = layer_search.data(folder, whole)
            probe = search.Probe(pipe, "heads", data, SAMPLES)
            made = []
            for layer in range(probe.layers):
                made.append(ranked(heads, functools.partial(_loss, probe, layer)))
                whole.advance(work)
            replace_file(path, json.dumps({"layers": made}, allow_nan=False).encode())
        layers = read_json(path, "table of losses", "Delete it and run again.", ("layers",))["layers"]
        made_for = opened.origin()
    kept = chosen(layers, heads, request.calibrate)
    configs = tuple(None if all(own) else Config(own) for own in kept)
    settings = Setting("heads", layers={"transformer": configs}, schedule=request.schedule)
    remarks = {"share": request.calibrate, **made_for, "losses": layers}
    return [
        f"{sum(map(sum, kept))} of {heads * len(kept)} heads kept; {configs.count(None)} of {len(kept)} layers dense",
        *request.write(FILE, settings, calibration=remarks),
    ]


def ranked(heads: int, loss: Callable[[tuple[int, ...]], float]) -> Ranked:
    """The heads of a layer by loss, and the losses of skipping the first together; `loss` takes 1 or 0 for each."""
    alone = [loss(_without([head], heads)) for head in range(heads)]
    order = sorted(range(heads), key=alone.__getitem__)
    return order, [alone[order[0]], *(loss(_without(order[:count], heads)) for count in range(2, heads))]


def chosen(layers: list[Ranked], heads: int, share: float) -> list[tuple[int, ...]]:
    """For each layer and head 1 if it is kept and 0 if not: at most a share of all heads, at the least total loss.

    A share that leaves a layer without a head is refused.
    """
    counts = range(1, heads)
    costs = tuple(1 - count / heads for count in counts)
    table = search.Table("heads", tuple(counts), costs, tuple(tuple(losses) for _, losses in layers))
    picked = search.budgeted(table, share)
    return [
        _without(order[: 0 if index is None else counts[index]], heads)
        for (order, _), index in zip(layers, picked, strict=True)
    ]


def _loss(probe: search.Probe, layer: int, keep: tuple[int, ...]) -> float:
    return probe.measure(layer, Config(keep))[0]


def _without(skipped: list[int], heads: int) -> tuple[int, ...]:
    return tuple(int(head not in skipped) for head in range(heads))
