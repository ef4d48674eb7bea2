"""The model card of a trained accelerator."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.files import replace_file
from dit_accel.generation.sources import EMBEDDED

if TYPE_CHECKING:
    from dit_accel.accelerator import Accelerator
    from dit_accel.generation.sources import Source
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
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return cls(source.model, source.revision, found.get("license_name") or found.get("license"))


def write(
    folder: pathlib.Path, base: Base, accel: Accelerator, settings: TrainSettings, data: Dataset, steps: int
) -> None:
    """Write `README.md`: base model, data, training, use and limits."""
    replace_file(folder / CARD, text(base, accel, settings, data, steps).encode())


def check(folder: pathlib.Path) -> None:
    """Refuse a folder without a model card that has a section for the quality."""
    _parts(folder)


def write_quality(folder: pathlib.Path, measured: str) -> None:
    """Write the measured quality, Markdown without headings, into a model card, in place of an earlier one."""
    before, after = _parts(folder)
    replace_file(folder / CARD, f"{before}{QUALITY}{measured}{LIMITS}{after}".encode())


def _parts(folder: pathlib.Path) -> tuple[str, str]:
    """The card's text before and after the measured quality."""
    try:
        before, found, rest = (folder / CARD).read_text(encoding="utf-8").partition(QUALITY)
    except OSError as error:
        raise DitAccelError(
            f"{folder} has no model card to write into ({CARD}: {error.strerror}). `dit-accel train` makes one."
        ) from error
    _, limits, after = rest.partition(LIMITS)
    if not found or not limits:
        raise DitAccelError(
            f"{folder / CARD} lacks the headings {QUALITY.strip()!r} and {LIMITS.strip()!r}. The measured quality goes "
            "between them; add them."
        )
    return before, after


def text(base: Base, accel: Accelerator, settings: TrainSettings, data: Dataset, steps: int) -> str:
    """The card as Markdown with the Hub's header."""
    licence = NON_COMMERCIAL.get(base.model) or base.licence
    restricted = licence is not None and "non-commercial" in licence.lower()
    warning = f"> **Not for commercial use.** The base model's licence ({licence}) covers weights derived from it.\n\n"
    kinds = [f"a LoRA of rank {settings.rank}" if settings.rank else "all weights of the transformer"]
    if not settings.trains_model:
        kinds = []
    if learned := len(accel.learned_weights()):
        kinds.append(f"{accel.method}'s own weights in {learned} layers")
    objectives = ", ".join(f"{name} x {weight:g}" for name, weight in settings.objectives.items())
    call = accel.trained.call if accel.trained is not None else {}
    sampling = f"\nMade to be sampled with {json.dumps(dict(call))}.\n" if call else ""
    rows = "\n".join(f"| {key} | {_plain(value)} |" for key, value in settings.as_dict().items())
    about = "\n".join(f"| {key} | {_plain(value)} |" for key, value in data.about.items())
    revision = "" if base.revision is None else f", revision {base.revision}"
    loading = f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({base.model!r})"
    if base.model in EMBEDDED:
        loading = "from dit_accel.pipelines.demo import load_demo\n\npipe = load_demo()"
    header = {"base_model": base.model, "library_name": "diffusers", "license": licence or "other"}
    front = "\n".join(f"{key}: {value}" for key, value in header.items())
    return f"""---
{front}
tags:
- dit_accel
- {accel.method}
---

# {base.model} with {accel.method} attention

{warning if restricted else ""}Fine-tuned for `{accel.config}` by dit_accel: {", and ".join(kinds)}; {steps} steps.

```python
import dit_accel
{loading}
accel = dit_accel.load(pipe, "this folder")
```
{sampling}
The LoRA, if there is one, also loads with Diffusers' `load_lora_weights`, without the attention it was trained for.

## Base model

{base.model}{revision}; licence: {licence or "not recorded, see the base model"}.

## Data

| {len(data)} samples | |
|---|---|
{about}

## Training

Objectives: {objectives}.

| setting | value |
|---|---|
{rows}
{QUALITY}Not measured yet: `dit-accel eval --load FOLDER --write-card` measures it and writes it here.{LIMITS}\
Made for these base weights and this method; other weights of the same shape are refused unless asked for. Sizes far
from the training data's are not covered.
"""


def _plain(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
