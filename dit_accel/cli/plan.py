"""`dit-accel plan`: the plan of a method on a grid, without running a model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from dit_accel import registry
from dit_accel.cli.options import JsonOptions, command
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, check_file, check_ours, staged
from dit_accel.generation.output import check_matplotlib
from dit_accel.generation.request import (
    METHOD_FORM,
    MOST_STEPS,
    MethodOptions,
    ModelRequest,
    SettingsOptions,
    SizeOptions,
    SourceOptions,
    Subject,
    method_advice,
)
from dit_accel.plans import ramps
from dit_accel.values import option

if TYPE_CHECKING:
    from dit_accel.generation.candidate import Candidate
    from dit_accel.plans.plan import Plan
    from dit_accel.tokens import TokenGrid

HEAD_DIM = 128  # of most models
ENDS = ("first_sparse_step", "last_sparse_step")  # of a ramp


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(JsonOptions, SizeOptions, SourceOptions, SettingsOptions):
    """The options of `dit-accel plan`."""

    method: str | None = option(None, "How attention is computed.", metavar=METHOD_FORM)
    level: Literal["faithful", "balanced", "fast"] | None = option(
        None,
        "With --model: use the settings of a level for its size, in place of --method. With --gpu, those for a GPU.",
    )
    preset: bool = option(
        False, "With --model: use the settings recommended for it. Settings that you give take precedence."
    )
    steps: int | None = option(
        None, "With --level: number of denoising steps; by default the model's own.", least=1, most=MOST_STEPS
    )
    grid: str | None = option(None, "Tokens: frames, height and width, such as 30x48x80.", metavar="FxHxW")
    text: int | None = option(None, "Text tokens in the sequence.", least=0)
    text_first: bool = option(False, "Text comes before the visual tokens.")
    model: str | None = option(  # type: ignore[assignment]
        None, "Instead of --grid: demo, a folder or a Hub id; only its JSON files are read."
    )
    gpu: str | None = option(
        None, "Also show what would run on this GPU, such as sm_90; it need not be present.", metavar="sm_80|sm_90|..."
    )
    head_dim: int | None = option(
        None, "Channels of a head, for --gpu and --gpus; by default the model's, or 128 where none is known.", least=1
    )
    gpus: int | None = option(
        None, "Predict what this many GPUs do in a layer; needs --heads, --tflops and --link.", least=1, most=256
    )
    parallel: Literal["ulysses", "ring", "unified"] = option(
        "ulysses", "With --gpus: share heads (ulysses), ranges of tokens (ring), or both (unified)."
    )
    heads: int | None = option(None, "With --gpus: attention heads of a layer.", least=1)
    tflops: float | None = option(None, "With --gpus: speed of one GPU on kept pairs, in TFLOP/s.", above=0)
    link: float | None = option(None, "With --gpus: bandwidth into and out of each GPU, in GB/s.", above=0)
    image: Path | None = option(None, "Save a picture of the block mask, with axes and a legend.", metavar="FILE.png")

    def candidate(self) -> Candidate:
        """The setting of these options.

        Raises:
            DitAccelError: there is no method, or its settings are refused.
        """
        if self.model is None and (self.preset or self.level):
            raise DitAccelError("--preset and --level need a model. Give --model in place of --grid.")
        if self.steps is not None and self.level is None:
            raise DitAccelError("--steps changes only what --level chooses. Add --level, or leave --steps out.")
        if not (self.method or self.level or self.preset):
            family = None if self.model is None else self.subject().family
            raise DitAccelError(f"plan needs a method. {method_advice(family)}")
        options = MethodOptions(method=self.method, settings=self.settings, preset=self.preset, level=self.level)
        return options.candidate(None if self.model is None else self.subject)

    def check_gpus(self) -> None:
        """What a prediction for several GPUs needs, and what it cannot be given with."""
        if self.gpus is None and self.gpu is None and self.head_dim is not None:
            raise DitAccelError("--head-dim changes only what --gpu and --gpus show. Add one of them, or leave it out.")
        needs = {"--heads": self.heads, "--tflops": self.tflops, "--link": self.link}
        if self.gpus is None:
            typed = [name for name, value in needs.items() if value is not None]
            if typed or self.parallel != "ulysses":
                raise DitAccelError(f"{typed[0] if typed else '--parallel'} is part of a prediction. Add --gpus.")
        elif missing := [name for name, value in needs.items() if value is None]:
            raise DitAccelError(f"--gpus needs more to predict times. Add {', '.join(missing)}.")
        elif self.image is not None or self.gpu is not None:
            raise DitAccelError("--gpus predicts only counts and times. Leave --image and --gpu out.")

    def channels(self) -> tuple[int, str]:
        """Channels of a head, and whose they are."""
        if self.head_dim is not None:
            return self.head_dim, "of --head-dim"
        if self.model is not None:
            from dit_accel.generation.sources import find

            config = find(self.model, self.revision).config("transformer")
            for name in ("attention_head_dim", "head_dim"):
                if isinstance(config.get(name), int):
                    return config[name], "of the model"
        return HEAD_DIM, "of most models"

    def subject(self) -> Subject:
        """What a preset or a level is chosen for; with --gpu on a GPU."""
        from dit_accel.generation.sources import find

        assert self.model is not None
        request = ModelRequest(
            model=self.model,
            revision=self.revision,
            frames=self.frames,
            height=self.height,
            width=self.width,
            steps=self.steps,
        )
        subject = request.subject(find(self.model, self.revision))
        if self.gpu is None:
            return subject
        return dataclasses.replace(subject, case=dataclasses.replace(subject.case, gpu=True))

    def tokens(self) -> TokenGrid:
        """The grid as given, or that of a model for a size in frames and pixels."""
        if (self.grid is None) == (self.model is None):
            raise DitAccelError(
                "Give either --grid FxHxW, or --model with --frames, --height and --width; "
                f"{'got neither' if self.grid is None else 'got both'}."
            )
        from dit_accel.tokens import TokenGrid

        size = (self.frames, self.height, self.width)
        if self.grid is not None:
            if any(size) or self.revision is not None:
                raise DitAccelError("--frames, --height, --width and --revision go with --model; --grid is in tokens.")
            if not re.fullmatch(r"\d+x\d+x\d+", self.grid):
                raise DitAccelError(f"--grid is frames x height x width in tokens, as 30x48x80; got {self.grid!r}.")
            t, h, w = (int(length) for length in self.grid.split("x"))
            return TokenGrid(t, h, w, text=self.text or 0, text_first=self.text_first)
        if self.text is not None or self.text_first:
            raise DitAccelError("--text and --text-first go with --grid; a model sets its own text.")

        from dit_accel.generation.sources import find

        assert self.model is not None
        sizes = find(self.model, self.revision).sizes()
        return sizes.grid(*sizes.chosen(*size))


@command(PlanOptions)
def plan(typed: dict[str, Any]) -> None:
    """Show a method's density, exact pairs, visited blocks and ideal speed-up; for a ramp, in its first and last step.

    Example: dit-accel plan --method gna:window=18x24x24,stride=16x8x8 --grid 30x48x80 --text 256
    """
    options = PlanOptions(**typed)
    options.check_gpus()
    if options.image is not None:
        check_file(options.image, (".png",), option="--image")
        check_ours([options.image], "--image")
        check_matplotlib()
    grid, candidate = options.tokens(), options.candidate()
    setting = candidate.setting
    assert setting is not None
    if options.image is not None:
        ramps.of_all_steps(setting.config, "What --image draws")
    if options.gpus is not None:
        ramps.of_all_steps(setting.config, "What --gpus predicts")
        _print_forecast(_forecast(setting.plan(grid), options), options.json)
        return
    plans = [dataclasses.replace(setting, config=end).plan(grid) for end in ramps.ends(setting.config)]
    head = {"setting": setting.text, "notes": candidate.notes, "refused": _refusal(candidate, grid)}
    facts = [head | _facts(plan, options) for plan in plans]
    if options.image is not None:
        from dit_accel.plans.picture import block_picture

        picture = block_picture(plans[0])
        with staged(options.image) as stage:
            picture.savefig(stage / options.image.name, metadata={"Comment": MARK})
    if options.json:
        ends = head | dict(zip(ENDS, facts, strict=True)) if len(facts) > 1 else facts[0]
        typer.echo(json.dumps(ends, indent=2))
        return
    for end, of_end in zip(ENDS, facts, strict=False):
        if len(facts) > 1:
            typer.echo(f"{end.replace('_', ' ')}:")
        _print_table(of_end, setting.words())


def _refusal(candidate: Candidate, grid: TokenGrid) -> str | None:
    """Why `accelerate` refuses the setting on this grid, such as that it keeps every pair; None if it does not."""
    try:
        candidate.plans(grid)
    except DitAccelError as error:
        return str(error)
    return None


def _facts(plan: Plan, options: PlanOptions) -> dict[str, Any]:
    """The facts of a plan that are known before it runs. A routed one knows at most a bound of the visited blocks."""
    from dit_accel.plans.routed import RoutedPlan

    routed = isinstance(plan, RoutedPlan)
    blocks: Any = plan if routed else plan.block_mask()
    queries, keys, visited, total = blocks.query_order, blocks.key_order, blocks.visited, blocks.total
    facts: dict[str, Any] = {
        "method": plan.method,
        "config": registry.settings_of(plan.config),
        "grid": dataclasses.asdict(plan.grid),
        "tokens": plan.grid.tokens,
        "pairs": plan.pairs,
        "density": plan.density,
        "pairs_bounds": plan.bounds if isinstance(plan, RoutedPlan) else (plan.pairs, plan.pairs),
        "query_block": {"tokens": queries.block, "tile": queries.tile},
        "key_block": {"tokens": keys.block, "tile": keys.tile},
        "blocks_visited": visited,
        "blocks_full": None if routed else blocks.full,
        "blocks_total": total,
    }
    if options.gpu is not None:
        learned = registry.get_method(plan.method).learned(plan.config) is not None
        head_dim, whose = options.channels()
        choices = plan.implementation(options.gpu, head_dim=head_dim, learned=learned)
        facts["head_dim"], facts["head_dim_of"] = head_dim, whose
        facts["implementation"] = {options.gpu: [choice._asdict() for choice in choices]}
        facts["only_named"] = {options.gpu: plan.only_named(options.gpu, head_dim=head_dim, learned=learned)}
    if visited is not None:
        facts["block_density"] = visited / total
    if visited and plan.method != registry.DENSE:
        # dense attention has no padding slots, so they count against the method
        facts["ideal_speedup"] = plan.grid.tokens**2 / (visited * queries.block * keys.block * plan.head_share)
    return facts


def _forecast(plan: Plan, options: PlanOptions) -> dict[str, Any]:
    """The prediction for several GPUs, beside that for one."""
    from dit_accel.plans.several_gpus import forecast

    assert options.gpus and options.heads and options.tflops and options.link
    head_dim, _ = options.channels()
    several = forecast(plan, options.gpus, options.parallel, options.heads, head_dim)
    one = forecast(plan, 1, "ulysses", options.heads, head_dim)
    compute, traffic = several.compute_ms(options.tflops, head_dim), several.traffic_ms(options.link)
    alone = one.compute_ms(options.tflops, head_dim)
    return {
        "method": plan.method,
        "config": registry.settings_of(plan.config),
        "grid": dataclasses.asdict(plan.grid),
        "density": plan.density,
        "head_dim": head_dim,
        "parallel": options.parallel,
        "ulysses_degree": several.ulysses,
        "ring_degree": several.ring,
        "ranks": [dataclasses.asdict(work) for work in several.work],
        "balance": several.balance,
        "transfers": several.fetches,
        "transfers_of_dense": several.possible,
        "compute_ms": compute,
        "traffic_ms": traffic,
        "one_gpu_ms": alone,
        "speedup": {"traffic after compute": alone / (compute + traffic), "hidden": alone / max(compute, traffic)},
    }


def _print_forecast(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    slow, hidden = facts["speedup"].values()
    typer.echo(f"predicted, a layer's attention forward, one sample, density {facts['density']:.4f}")
    typer.echo(f"Ulysses {facts['ulysses_degree']} x ring {facts['ring_degree']}")
    typer.echo(f"compute {facts['compute_ms']:.2f} ms on the slowest GPU, {facts['one_gpu_ms']:.2f} ms on one alone")
    typer.echo(f"traffic {facts['traffic_ms']:.2f} ms")
    typer.echo(f"balance {facts['balance']:.3f}: mean over largest number of pairs of a GPU")
    if facts["transfers_of_dense"]:
        typer.echo(f"ring transfers {facts['transfers']} of {facts['transfers_of_dense']}: the others are never read")
    typer.echo(f"speed-up {slow:.2f} times one GPU, {hidden:.2f} if traffic hides behind compute")


def _print_table(facts: dict[str, Any], words: dict[str, str]) -> None:
    """Print the facts of a plan; `words` are what the setting has besides the method, by name."""
    from rich.console import Console
    from rich.table import Table

    from dit_accel.registry import value_text
    from dit_accel.tokens import TokenGrid

    settings = ", ".join(f"{key}={value_text(value)}" for key, value in facts["config"].items())
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for note in facts["notes"]:
        table.add_row("chosen", note)
    if facts["refused"]:
        table.add_row("refused", facts["refused"])
    table.add_row("method", f"{facts['method']} ({settings})" if settings else facts["method"])
    for name, text in words.items():
        table.add_row(name, text)
    if words:
        kind = "dense" if facts["method"] == registry.DENSE else "sparse"
        table.add_row("figures", f"of one {kind} attention call, without the rows above")
    table.add_row("tokens", f"{facts['tokens']:,} ({TokenGrid(**facts['grid'])})")
    known, every = facts["pairs"] is not None, facts["tokens"] ** 2
    pairs, note = (facts["pairs"], "") if known else (facts["pairs_bounds"][0], "at least ")
    table.add_row("pairs", f"{note}{pairs:,} of {every:,}")
    table.add_row("density", f"{note}{pairs / every:.4f}")
    queries, keys = _block_text(facts["query_block"], "queries"), _block_text(facts["key_block"], "keys")
    table.add_row("blocks", f"{queries} x {keys}")
    if facts["blocks_visited"] is not None:
        share = f"({facts['block_density']:.4f})"
        table.add_row("visited", f"{facts['blocks_visited']:,} of {facts['blocks_total']:,} {share}")
    if facts["blocks_full"] is not None:
        table.add_row("full", f"{facts['blocks_full']:,}")
    if "ideal_speedup" in facts:
        speedup = f"{facts['ideal_speedup']:.2f} times dense attention"
        table.add_row("ideal speed-up", f"{speedup}, if every visited block costs the same")
    if "head_dim" in facts:
        table.add_row("channels", f"{facts['head_dim']} a head, {facts['head_dim_of']}")
    for gpu, choices in facts.get("implementation", {}).items():
        for choice in choices:
            table.add_row(f"{gpu}, {choice['part']}", f"{choice['name']}: {choice['faster'] or choice['why']}")
        if facts["only_named"][gpu]:
            table.add_row(f"{gpu}, if named", ", ".join(f'impl="{name}"' for name in facts["only_named"][gpu]))
    Console().print(table)


def _block_text(block: dict[str, Any], name: str) -> str:
    shape = f"{'x'.join(map(str, block['tile']))} tile" if block["tile"] else "raster"
    return f"{block['tokens']} {name} ({shape})"
