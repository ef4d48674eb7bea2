"""A user's file that calls every public function; mypy reads it, and nothing runs it (tests/test_typed.py)."""
# mypy: disallow-untyped-calls, disallow-untyped-defs, warn-return-any

from __future__ import annotations

import pathlib
from typing import Any

import torch

import dit_accel


def generate(pipe: Any) -> str:
    accel = dit_accel.accelerate(
        pipe, "radial", decay=0.2, dense_steps=12, dense_last_steps=0.1, dense_layers=(0, 1), impl="auto"
    )
    dit_accel.parallelize(pipe, ulysses=2)
    pipe("a boat on the sea")
    left: list[str] = accel.remove()
    with dit_accel.accelerated(pipe, "gna:window=18x24x24 dense_steps=0.25", verify="first-call") as inner:
        pipe("a boat on the sea")
    dit_accel.accelerate(pipe, "sol", preset=True, replace=True, cache="mag:threshold=0.12", keep_dense_above=0.2)
    dit_accel.accelerate(pipe, layer_schedule=pathlib.Path("schedule.json"), dense_backend="native", replace=True)
    accel = dit_accel.load(pipe, pathlib.Path("folder"), replace=True, any_weights=True)
    accel = dit_accel.load(pipe, "owner/name", settings=["topk=0.1"])
    return f"{left} {inner.report()} {accel.setting.text}"


def look(accel: dit_accel.Accelerator, transformer: torch.nn.Module) -> float:
    accel.apply()
    accel.set_step(3, 50)
    accel.set_step(None)
    with accel.paused(), accel.watch(lambda call: print(call.layer, call.step, call.measure().error)):
        transformer()
    modules: dict[str, torch.nn.Module] = accel.learned_weights()
    accel.save_pretrained("folder", push_to_hub=True, repo_id="owner/name", private=True)
    if accel.trained is not None:
        accel.take_training(accel.trained, lambda: None, ["trained elsewhere"])
    accel.add_notes(["seen by eye"])
    report = accel.report()
    by_step: dict[int, float] = report.step_density
    record: dict[str, Any] = report.as_dict()
    calls: int = report.sparse_calls + report.dense_calls + sum(report.calls.values())
    densities = [layer.density for layer in report.layers if layer.density is not None]
    print(
        report,
        by_step,
        record["setting"],
        len(modules),
        report.kept_every_pair,
        report.notes,
        report.grids,
        report.impl,
    )
    return sum(densities) / max(1, calls)


def settings(text: str) -> dit_accel.Setting:
    setting = dit_accel.Setting.parse(text, ["stride=2"], dense_steps=0.2)
    setting = dit_accel.Setting.make("gna", {"window": (3, 5, 7)}, dense_layers=(0, 2))
    pathlib.Path("setting.json").write_text(setting.to_json(remark="by hand"))
    setting = dit_accel.Setting.read("setting.json")
    setting = dit_accel.Setting.from_dict(setting.as_dict()).changed(dense_steps=2)
    words: dict[str, str] = setting.words()
    rows = setting.by_layer("transformer", 30)
    plan: dit_accel.Plan = setting.plan(dit_accel.TokenGrid(3, 5, 7))
    print(
        setting.ramped, setting.title, setting.text, words, rows[0][1], setting.configs(), plan.density, setting.method
    )
    return setting


def operators() -> torch.Tensor:
    grid = dit_accel.TokenGrid(frames=30, height=48, width=80, text=256, text_first=True)
    plan = dit_accel.plan("gna", grid, window=(18, 24, 24), stride=(16, 8, 8))
    if plan.density is not None and plan.pairs is not None:
        print(plan.pairs / grid.tokens**2, plan.density, grid.shape, grid.visual)
    plan.image().save("mask.png")
    mask: torch.Tensor = plan.token_mask()
    print(mask.shape, plan.block_mask().visited, plan.implementation("sm_90", head_dim=64))
    q = k = v = torch.randn(1, 2, grid.tokens, 64)
    lists = plan.route(q, k)
    print(lists is None or lists.indices.shape)
    return dit_accel.attention(q, k, v, plan)


def names() -> list[str]:
    try:
        return dit_accel.list_methods() + dit_accel.list_families()
    except dit_accel.DitAccelError as error:
        return [str(error)]
