"""`dit-accel ls`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from dit_accel.cli.options import JsonOptions, command

if TYPE_CHECKING:
    from dit_accel.pipelines.family import Family, Preset
    from dit_accel.registry import Method


@command(JsonOptions)
def ls(given: dict[str, Any]) -> None:
    """List the methods with their settings and sources, the model families, and which models are refused, and why."""
    from dit_accel import registry
    from dit_accel.generation.sources import EMBEDDED
    from dit_accel.pipelines.refused import REFUSED

    methods = [_method(found) for found in registry.get_methods().values()]
    families = [_family(found) for found in registry.get_families().values()]
    if JsonOptions(**given).json:
        listed = {"methods": methods, "families": families, "refused": REFUSED, "embedded": list(EMBEDDED)}
        typer.echo(json.dumps(listed, indent=2))
    else:
        _print_tables(methods, families, REFUSED, EMBEDDED)


def _method(method: Method) -> dict[str, Any]:
    """Name, summary, source, settings with defaults, and whether it learns weights."""
    settings = []
    for field in dataclasses.fields(method.config):
        required = field.default is dataclasses.MISSING
        settings.append({"name": field.name, "default": None if required else field.default, "required": required})
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.source,
        "settings": settings,
        "learns": method.module is not None,
    }


def _family(family: Family) -> dict[str, Any]:
    """Name, summary, transformer classes, and recommended settings with their source by method."""

    def shown(presets: Mapping[str, Preset]) -> dict[str, Any]:
        return {
            name: {"config": dict(preset.config), "schedule": dict(preset.schedule), "source": preset.source}
            for name, preset in presets.items()
        }

    return {
        "name": family.name,
        "summary": family.summary,
        "transformers": list(family.transformers),
        "recommended": shown(family.recommended),
        "recommended_pair": shown(family.recommended_pair),
    }


def _print_tables(
    methods: list[dict[str, Any]],
    families: list[dict[str, Any]],
    refused: Mapping[str, str],
    embedded: tuple[str, ...],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from dit_accel.generation.choice import value_text

    console = Console()
    table = Table("method", "what it does", "settings", "source", title="Methods", show_lines=True)
    for method in methods:
        settings = [
            f"{setting['name']}" + (" (required)" if setting["required"] else f"={value_text(setting['default'])}")
            for setting in method["settings"]
        ]
        table.add_row(method["name"], method["summary"], "\n".join(settings) or "-", method["source"])
    console.print(table)

    table = Table(title="Model families", show_lines=True)
    for column in ("family", "what it covers", "transformers", "recommended"):
        table.add_column(column, overflow="fold")
    for family in families:
        recommended = []
        pair = {f"{name}, two transformers": preset for name, preset in family["recommended_pair"].items()}
        for name, preset in (family["recommended"] | pair).items():
            pairs = {**preset["config"], **preset["schedule"]}.items()
            lines = [f"{name}:", *(f"{key}={value_text(value)}" for key, value in pairs), f"({preset['source']})"]
            recommended.append("\n".join(lines))
        table.add_row(
            family["name"], family["summary"], "\n".join(family["transformers"]), "\n".join(recommended) or "-"
        )
    console.print(table)

    table = Table("transformer", "why it is refused", title="Refused")
    for name, reason in refused.items():
        table.add_row(name, reason)
    console.print(table)
    console.print(f"Embedded models: {', '.join(embedded)}")
