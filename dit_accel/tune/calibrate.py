"""Calibration: the share of the key blocks that each head of each layer needs to reach a recall.

The recall of a head is the share of dense attention's softmax weight on the pairs that it keeps, text and conditioning
included. The blocks are those that sparge's router would keep by number, on the trajectory of dense attention. The mean
is over sampled queries, denoising steps, guidance branches and prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dit_accel.accelerator import Accelerator
from dit_accel.eval import quality
from dit_accel.eval.attention import QUERIES
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.sampling import TotalBar, progress_bar
from dit_accel.hooks.selfcheck import AttentionCall, sample
from dit_accel.methods.sparge import SpargePlan
from dit_accel.registry import make_config
from dit_accel.schedule import Schedule
from dit_accel.setting import Setting
from dit_accel.tune import heads
from dit_accel.tune.request import TuneRequest

FILE = "budgets.json"
ALL = {"topk": 1.0, "topp": 0.0, "tail": "none", "refresh": 1}  # of the run that is measured: it keeps every block
Curves = Mapping[str, Mapping[str, torch.Tensor | None]]  # by transformer and layer, in the order they run


def run(request: TuneRequest) -> list[str]:
    """Calibrate, write the layer schedule, and return lines that state the result.

    Raises:
        DitAccelError: the request cannot be carried out. Finished runs stay, and the next calibration uses them.
    """
    assert request.calibrate is not None
    name, config = request.calibrated()
    if name == "heads":
        return heads.run(request)
    measured = Setting.make("sparge", config | ALL, **request.words)
    candidate = Candidate(measured)
    with quality.opened(request.evaluation(metrics=("psnr",)), [candidate]) as evaluation, progress_bar() as progress:
        sweep, items = evaluation.sweep, evaluation.items
        each = sweep.steps(candidate) or 1
        whole = TotalBar(progress, "all prompts", each * len(items))
        found = []
        for item in items:
            asked, folder = {"queries": QUERIES}, request.output / "recalls"
            found.append(sweep.observe(candidate, item, "recall", asked, record_recalls, folder, whole))
            whole.advance(each)
        made = evaluation.origin()
    settings = budgeted(_mean(found), request.calibrate, config, measured.schedule)
    return [_describe(settings), *request.write(FILE, settings, calibration={"recall": request.calibrate, **made})]


@torch.no_grad()
def block_recall(call: AttentionCall, queries: int = QUERIES) -> torch.Tensor:
    """The recall of each head by the number of blocks that a row keeps: float64 [heads, key blocks].

    Entry c - 1 is that of the c best blocks, as a mean over the call's samples and some queries.

    Args:
        call: of sparge, with any settings.
        queries: visual queries to sample; all if there are fewer.
    """
    plan = call.plan
    assert isinstance(plan, SpargePlan)
    (batch, heads, *_), device, grid = call.q.shape, call.q.device, plan.grid
    chosen = sample(grid.visual, queries).to(device)
    of_query, of_key = (plan.block_of(order).to(device) for order in (plan.query_order, plan.key_order))
    rows, row = of_query[chosen].unique(return_inverse=True)
    found = torch.zeros(heads, plan.key_order.visual_blocks, dtype=torch.float64, device=device)
    for b in range(batch):
        ranked = plan.rank(call.q[b : b + 1], call.k[b : b + 1], rows, call.scale)[0]  # [heads, rows, key blocks]
        for h in range(heads):
            for chunk, weights in call.dense_weights(b, h, chosen):
                wide = weights.double()
                mass = wide.new_zeros(len(chunk), found.shape[1]).index_add_(1, of_key, wide[:, grid.visual_rows])
                others = wide.sum(-1, keepdim=True) - mass.sum(-1, keepdim=True)
                found[h] += (mass.gather(1, ranked[h, row[chunk]]).cumsum(1) + others).sum(0)
    return found / (batch * len(chosen))


def record_recalls(accel: Accelerator, run: Callable[[], Any]) -> dict[str, Any]:
    """The recalls of one run as plain lists: by transformer and layer, [heads][blocks kept - 1]; None where dense."""
    found: dict[tuple[str, str], list[torch.Tensor]] = {}

    def note(call: AttentionCall) -> None:
        total = found.setdefault((call.transformer, call.layer), [torch.zeros(()), torch.zeros(())])
        total[0], total[1] = total[0] + block_recall(call).cpu(), total[1] + 1

    with accel.watch(note):
        run()
    recalls: dict[str, Any] = {}
    for layer in accel.report().layers:
        own = found.get((layer.transformer, layer.name))
        curve = None if own is None else [[round(x, 7) for x in head] for head in (own[0] / own[1]).tolist()]
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


def budgeted(curves: Curves, recall: float, config: Mapping[str, Any], schedule: Schedule) -> Setting:
    """The layer schedule in which every head keeps the fewest blocks that reach a recall.

    A share of (c - 1/2) / blocks, rounded up, is c of those blocks. A layer whose heads all need every block is dense.

    Args:
        curves: float64 [heads, key blocks] of each layer; None is dense.
        config: other settings of sparge.
        schedule: its dense steps are the file's.
    """
    layers: dict[str, tuple[Any, ...]] = {}
    for transformer, own in curves.items():
        row: list[Any] = []
        for curve in own.values():
            blocks = 0 if curve is None else curve.shape[1]
            counts = [] if curve is None else (1 + (curve < recall).sum(-1)).clamp(max=blocks).tolist()
            if min(counts, default=blocks) == blocks:
                row.append(None)
                continue
            budgets = tuple(round((count - 0.5) / blocks, 7) for count in counts)
            row.append(make_config("sparge", {**config, "topk": 0.0, "topp": 0.0, "budgets": budgets}))
        layers[transformer] = tuple(row)
    return Setting("sparge", layers=layers, schedule=dataclasses.replace(schedule, dense_layers=0))


def _describe(setting: Setting) -> str:
    every = [config for row in (setting.layers or {}).values() for config in row]
    shares = [share for config in every if config is not None for share in config.budgets]
    dense = f"{every.count(None)} of {len(every)} layers dense"
    if not shares:
        return f"every head needs all blocks; {dense}"
    spread = f"{sum(shares) / len(shares):.3f} on average, {min(shares):.3f} to {max(shares):.3f}"
    return f"share of the key blocks, by head: {spread}; {dense}"
