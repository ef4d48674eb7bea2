"""`dit-accel ls`: lists methods, model families and refused models."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from dit_accel import registry, values
from dit_accel.cli import show_lines
from dit_accel.cli.options import JsonOptions, command
from dit_accel.errors import DitAccelError
from dit_accel.generation.sources import EMBEDDED
from dit_accel.pipelines import demo
from dit_accel.pipelines.levels import DEFAULT
from dit_accel.pipelines.refused import REFUSED
from dit_accel.registry import did_you_mean
from dit_accel.values import option

if TYPE_CHECKING:
    from dit_accel.method import Method
    from dit_accel.pipelines.family import Family


PAGE = "docs/methods.md"  # of the checkout; it leads to the section of each method


@dataclasses.dataclass(frozen=True, kw_only=True)
class LsOptions(JsonOptions):
    """The options of `dit-accel ls`."""

    name: str | None = option(
        None,
        "Show everything about one method, family, transformer class or embedded model; formats: about the "
        "formats of published weights.",
        positional=True,
    )


@command(LsOptions)
def ls(typed: dict[str, Any]) -> None:
    """List methods, model families and refused transformers; with a name, show everything about one of them.

    Example: dit-accel ls wan
    """
    options = LsOptions(**typed)
    methods = {name: _method(method) for name, method in registry.get_methods().items()}
    families = {name: _family(family) for name, family in registry.get_families().items()}
    if options.name == "formats":
        _print_formats(options.json)
    elif options.name is not None:
        entry = _find(options.name, methods, families)
        if options.json:
            typer.echo(json.dumps(entry, indent=2))
        else:
            show_lines(_describe(entry))
    elif options.json:
        lists = {"methods": list(methods.values()), "families": list(families.values())}
        typer.echo(json.dumps(lists | {"refused": REFUSED, "embedded": list(EMBEDDED)}, indent=2))
    else:
        _print_lists()


def _find(name: str, methods: Mapping[str, Any], families: Mapping[str, Any]) -> dict[str, Any]:
    """The method, the family (by its own name or that of one of its transformers) or the refused transformer."""
    classes = {kind: family for family in families.values() for kind in family["transformers"]}
    if name in EMBEDDED:
        return _embedded(name)
    for known in (methods, families, classes):
        if name in known:
            return dict(known[name])
    if name in REFUSED:
        return {"name": name, "refused": REFUSED[name]}
    near = did_you_mean(name, [*methods, *families, *classes, *EMBEDDED, *REFUSED])
    raise DitAccelError(f"There is no method, family or transformer {name!r}.{near} `dit-accel ls` lists them.")


def _method(method: Method) -> dict[str, Any]:
    """Name, summary, when to choose it, source, settings with defaults, and the training that it needs or has."""
    settings, sentences, hints = [], _sentences(method.config), typing.get_type_hints(method.config)
    for field in registry.fields_of(method.config):
        required = field.default is dataclasses.MISSING
        settings.append(
            {
                "name": field.name,
                "default": None if required else field.default,
                "required": required,
                "help": sentences.get(field.name, ""),
                "range": _range(field, hints[field.name]),
                "ramps": "option" in field.metadata and field.metadata["option"].ramps,
                "example": f"{method.name}:{registry.example_of(method.config, field.name)}",
            }
        )
    return {
        "name": method.name,
        "summary": method.summary,
        "good_for": method.good_for,
        "experimental": method.experimental,
        "source": method.source,
        "settings": settings,
        "needs_training": method.needs_training,
        "objectives": [objective.name for objective in method.objectives],
        "calibrates": method.calibration is not None,
        "presets": [family.name for family in registry.get_families().values() if method.name in family.recommended],
        "page": PAGE,
    }


def _sentences(config: type) -> dict[str, str]:
    """What the docstrings of a method's settings and their bases say of each."""
    sentences: dict[str, str] = {}
    for kind in config.__mro__:
        text = inspect.cleandoc(kind.__doc__ or "")
        arguments = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
        for entry in re.split(r"\n(?= {4}\w)", arguments[1] if arguments else ""):
            name, _, about = entry.strip().partition(": ")
            sentences.setdefault(name, " ".join(about.replace("``", "").split()))
    return sentences


def _range(field: dataclasses.Field[Any], hint: Any) -> str:
    """The values that a setting takes, as far as its annotation and limits say."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, kinds))}"
    if len(kinds) != 1 or kinds[0] not in values.WORDS:
        return ""
    known: values.Option | None = field.metadata.get("option")
    limits = {} if known is None else {"at least": known.least, "above": known.above, "at most": known.most}
    return ", ".join(
        [values.WORDS[kinds[0]], *(f"{words} {limit}" for words, limit in limits.items() if limit is not None)]
    )


def _embedded(name: str) -> dict[str, Any]:
    """What an embedded model makes, and commands to begin with."""
    from dit_accel.pipelines.demo import clips  # which imports PyTorch

    size = demo.DEFAULTS
    return {
        "name": name,
        "summary": f"a small WanPipeline in the package, of the family wan; {size.num_frames} frames of {size.width}x"
        f"{size.height} in {size.num_inference_steps} steps without guidance. It draws {', '.join(clips.SHAPES)} in "
        f"{', '.join(clips.COLOURS)} that move {', '.join(clips.DIRECTIONS)}",
        "commands": [
            f"dit-accel generate --model {name} --level {DEFAULT} --compare --output {name}.mp4",
            f"dit-accel eval --model {name} --prompts {name} --level faithful --level fast --output evaluation",
        ],
    }


def _family(family: Family) -> dict[str, Any]:
    """Name, summary, transformer classes, and recommended settings by method, the one to start with first."""
    return {
        "name": family.name,
        "summary": family.summary,
        "transformers": list(family.transformers),
        "recommended": {name: dataclasses.asdict(preset) for name, preset in family.recommended.items()},
        "recommended_pair": {name: dataclasses.asdict(preset) for name, preset in family.recommended_pair.items()},
    }


def _print_formats(as_json: bool) -> None:
    """The formats of published weights that --load reads."""
    from dit_accel.checkpoint import published

    if as_json:
        names = ("name", "summary", "source", "transformers")
        formats = [{name: getattr(known, name) for name in names} for known in published.get_formats().values()]
        typer.echo(json.dumps(formats, indent=2))
        return
    for known in published.get_formats().values():
        show_lines([f"{known.name}: {known.summary}", f"  for {', '.join(known.transformers)}; {known.source}"])


def _describe(entry: Mapping[str, Any]) -> list[str]:
    """All about one entry, in lines."""
    from dit_accel.registry import value_text

    if "refused" in entry:
        return [f"{entry['name']} is refused: {entry['refused']}."]
    lines = [f"{entry['name']}: {entry['summary']}"]
    if "settings" in entry:
        experimental = " It is experimental." if entry["experimental"] else ""
        lines += [f"Choose it for {entry['good_for']}.{experimental}", f"source: {entry['source']}"]
        for setting in entry["settings"]:
            default = "required" if setting["required"] else f"{value_text(setting['default'])} by default"
            span = f"; {setting['range']}" if setting["range"] else ""
            span += "; it may be a ramp over the sparse steps, START..END" if setting["ramps"] else ""
            lines.append(f"  {setting['name']}: {default}{span}; for example {setting['example']}")
            lines += [f"    {setting['help']}"] if setting["help"] else []
        if entry["presets"]:
            lines.append(f"presets: {', '.join(entry['presets'])}; `dit-accel ls FAMILY` shows them")
        lines += ["It needs fine-tuning: see `dit-accel train`."] if entry["needs_training"] else []
        lines += [f"objectives of its own: {', '.join(entry['objectives'])}"] if entry["objectives"] else []
        lines += ["`dit-accel tune --calibrate` sets it layer by layer."] if entry["calibrates"] else []
        return [*lines, f"more: {entry['page']}, under {entry['name']}"]
    if "commands" in entry:
        return [*lines, *(f"  {command}" for command in entry["commands"])]
    lines.append(f"transformers: {', '.join(entry['transformers'])}")
    first = next(iter(entry["recommended"]), None)
    start = f"; or with the preset of {first}: --method {first} --preset" if first else ""
    lines.append(f"Start here: dit_accel.accelerate(pipe), or --level {DEFAULT} of `dit-accel generate`{start}")
    pair = {f"{name}, two transformers": preset for name, preset in entry["recommended_pair"].items()}
    for name, preset in (entry["recommended"] | pair).items():
        settings = {**preset["config"], **preset["schedule"]}.items()
        lines.append(f"preset of {name}: {', '.join(f'{key}={value_text(value)}' for key, value in settings)}")
        lines.append(f"  {preset['source']}")
    return lines


def _print_lists() -> None:
    """An entry each, wrapped at the terminal's width: when to choose a method, what a family covers and its presets."""
    for kind, family in (("videos", "wan"), ("images", "flux")):
        first = registry.get_families()[family].first_preset
        typer.echo(f"Start here with {kind}: --level {DEFAULT}, or --method {first} --preset ({family})")
    methods = {name: method.advice for name, method in registry.get_methods().items()}
    families = {name: _covers(family) for name, family in registry.get_families().items()}
    for title, entries in (("Methods, and what to choose them for", methods), ("Model families", families)):
        typer.echo(f"{title}:")
        width = max(map(len, entries))
        show_lines((f"  {name:{width}}  {about}" for name, about in entries.items()), hang=width + 2)
    lines = (
        f"Refused: {len(REFUSED)} transformers, each with its reason",
        f"Embedded models: {', '.join(EMBEDDED)}",
        "All about one: dit-accel ls NAME, of any of these or a transformer's class",
        "Published weights that --load reads: dit-accel ls formats",
    )
    show_lines(lines)


def _covers(family: Family) -> str:
    presets = ", ".join(sorted(family.recommended))
    return family.summary + (f" (presets: {presets})" if presets else "")
