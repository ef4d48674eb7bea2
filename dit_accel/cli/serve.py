"""`dit-accel serve`: the comparison of `generate --compare` as a page in the browser."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from dit_accel.cli.options import command
from dit_accel.generation.request import PROMPT, ModelRequest
from dit_accel.values import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageOptions(ModelRequest):
    """The options of `dit-accel serve`."""

    PANEL: ClassVar[str] = "Page"

    host: str = option("127.0.0.1", "Address to listen on. Any other than the default lets other machines connect.")
    port: int = option(7860, "Port to listen on.", least=1, most=65535)


@command(PageOptions)
def serve(arguments: dict[str, Any]) -> None:
    """Compare dense and accelerated outputs on a page in the browser, one comparison at a time.

    Example: dit-accel serve --model demo
    """
    options = PageOptions(**arguments)
    with tempfile.TemporaryDirectory(prefix="dit-accel-") as folder:
        start(options, Path(folder), block=True)


def start(options: PageOptions, folder: Path, *, block: bool) -> str:
    """Load the model and serve the page; errors as in `Playground` and `launch`. Outputs go into `folder`."""
    from dit_accel.cli import page
    from dit_accel.cli.playground import Playground

    copies, outputs = folder / "copies", folder / "outputs"
    gradio = page.load_gradio(copies)
    outputs.mkdir()
    model = {field.name: getattr(options, field.name) for field in dataclasses.fields(ModelRequest)}
    playground = Playground(ModelRequest(**model), outputs)
    defaults = {"prompt": PROMPT, "seed": 0, **playground.sampling}
    built = page.build(gradio, playground, defaults)
    return page.launch(gradio, built, options.host, options.port, block=block)
