"""The model card of a trained accelerator."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from dit_accel.accelerator import Accelerator
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, replace_file
from dit_accel.generation.sources import EMBEDDED, Source
from dit_accel.train.data import Dataset
from dit_accel.train.settings import TrainSettings

# base models whose licence forbids commercial use of derived models
NON_COMMERCIAL = {
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-Fill-dev": "flux-1-dev-non-commercial-license",
}

CARD = "README.md"
QUALITY, LIMITS = "\n## Quality\n\n", "\n\n## Limits\n\n"


@dataclasses.dataclass(frozen=True)
class Base:
    """The base model.

    Args:
        model: embedded name, folder or Hub id.
        revision: on the Hub.
        licence: of its weights; None if unknown.
    """

    model: str
    revision: str | None = None
    licence: str | None = None

    @classmethod
    def of(cls, source: Source) -> Base:
        """The model of a source, with the licence from its model card's header."""
        if source.kind == "embedded":
            return cls(source.model, licence="apache-2.0")
        path = source.folder / CARD
        parts = path.read_text(encoding="utf-8", errors="replace").split("---") if path.is_file() else []
        lines = parts[1].splitlines() if len(parts) > 2 else []
        entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return cls(source.model, source.revision, entries.get("license_name") or entries.get("license"))


def write_quality(folder: pathlib.Path, measured: str) -> None:
    """Write the measured quality, Markdown without headings, into a model card, in place of an earlier one."""
    before, after = split(folder)
    replace_file(folder / CARD, f"{before}{QUALITY}{measured}{LIMITS}{after}".encode(), checked=True)


def split(folder: pathlib.Path) -> tuple[str, str]:
    """The card's text before and after the measured quality; a folder without a card that has both is refused."""
    try:
        before, heading, rest = (folder / CARD).read_text(encoding="utf-8").partition(QUALITY)
    except OSError as error:
        raise DitAccelError(
            f"{folder} has no model card to write into ({CARD}: {error.strerror}). `dit-accel train` makes one."
        ) from error
    _, limits, after = rest.partition(LIMITS)
    if not heading or not limits:
        raise DitAccelError(
            f"{folder / CARD} lacks the headings {QUALITY.strip()!r} and {LIMITS.strip()!r}. The measured quality goes "
            "between them; add them."
        )
    return before, after


def write(
    folder: pathlib.Path, base: Base, accel: Accelerator, settings: TrainSettings, data: Dataset, steps: int
) -> None:
    """Write `README.md` from `card.md.j2`: the Hub's header, base model, data, training, use and limits."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    licence = NON_COMMERCIAL.get(base.model) or base.licence
    kinds = [f"a LoRA of rank {settings.rank}" if settings.rank else "all weights of the transformer"]
    if not settings.trains_model:
        kinds = []
    if learned := len(accel.learned_weights()):
        kinds.append(f"{accel.setting.method}'s own weights in {learned} layers")
    environment = Environment(
        loader=FileSystemLoader(pathlib.Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["plain"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    text = environment.get_template("card.md.j2").render(
        base=base,
        accel=accel,
        settings=dataclasses.asdict(settings),
        data=data,
        steps=steps,
        licence=licence,
        restricted=licence is not None and "non-commercial" in licence.lower(),
        embedded=base.model in EMBEDDED,
        trained=kinds,
        objectives=", ".join(f"{name} x {weight:g}" for name, weight in settings.objectives.items()),
        call=json.dumps(dict(accel.trained.call)) if accel.trained is not None and accel.trained.call else None,
        quality=QUALITY,
        limits=LIMITS,
        mark=MARK,
    )
    replace_file(folder / CARD, text.encode())
