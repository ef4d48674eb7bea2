"""The playground's page, in Gradio: fields, two outputs side by side, the mask and the report."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.cli.playground import Cancelled, Playground
from dit_accel.errors import DitAccelError
from dit_accel.pipelines.levels import LEVELS

if TYPE_CHECKING:
    import gradio

METHOD = "a method"
NUMBERS = ("frames", "height", "width", "steps", "seed")
# The browser asks no other host, whatever a component would fetch.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
BUTTONS = ["download", "fullscreen"]  # none that shares
MOST_UPLOAD = 1  # bytes: the page takes no files


def load_gradio(folder: Path) -> Any:
    """Gradio without analytics, with `folder` for its copies of outputs; the error names the command that installs it.

    It reads its environment when it is imported, so nothing may import it before.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    try:
        import gradio
    except ImportError as error:
        raise DitAccelError(
            "serve needs Gradio, which is not installed: pip install 'dit_accel[playground]'."
        ) from error
    return gradio


def build(gradio: Any, playground: Playground, defaults: dict[str, Any]) -> gradio.Blocks:
    """The page.

    Args:
        defaults: what fields show at first, by name.
    """

    def run(
        ticket: str, level: str, method: str, cache: str, prompt: str, *numbers: int | None, progress: Any
    ) -> list[Any]:
        values: dict[str, Any] = {"prompt": prompt, "cache": cache, **dict(zip(NUMBERS, numbers, strict=True))}
        values |= {"method": method or None} if level == METHOD else {"level": level}

        def show(title: str, done: int, total: int) -> None:
            progress((done, total), desc=f"{title}: step {done} of {total}", unit="steps")

        nothing = [gradio.skip()] * 4
        try:
            comparison = playground.compare(ticket, values, show)
        except Cancelled:
            return [_line("Cancelled."), *nothing]
        except DitAccelError as error:
            return [_line(f"error: {error}", failed=True), *nothing]
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in comparison.remarks)
        outputs = zip((comparison.dense, comparison.accelerated), comparison.captions, strict=True)
        shown = [gradio.update(value=str(path), label=caption) for path, caption in outputs]
        return [
            _line(comparison.likeness),
            *shown,
            None if comparison.mask is None else str(comparison.mask),
            remarks + comparison.report,
        ]

    def follow(*inputs: Any, progress: Any = gradio.Progress()) -> list[Any]:  # noqa: B008  Gradio looks for it here
        return run(*inputs, progress=progress)

    def cancel(ticket: str | None) -> str | Any:
        if ticket is not None and playground.cancel(ticket):
            return _line("Stops at the next step …")
        return gradio.skip()

    with gradio.Blocks(title="dit_accel playground", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gradio.Markdown(f"# dit_accel playground\nModel: `{playground.options['model']}`")
        ticket = gradio.State()
        prompt = gradio.Textbox(defaults["prompt"], label="Prompt", elem_id="prompt")
        with gradio.Row():
            level = gradio.Radio([*LEVELS, METHOD], value="fast", label="Level, or a method", elem_id="level")
            method = gradio.Textbox("sol dense_steps=2", label="Method with settings", elem_id="method")
            cache = gradio.Textbox(label="Step cache, such as mag:threshold=0.12", elem_id="cache")
        with gradio.Row():
            numbers = [
                gradio.Number(defaults[name], label=name.capitalize(), precision=0, elem_id=name, min_width=90)
                for name in NUMBERS
                if name != "frames" or playground.video
            ]
            if not playground.video:
                numbers.insert(0, gradio.State())
        with gradio.Row():
            start = gradio.Button("Compare", variant="primary", elem_id="start")
            stop = gradio.Button("Cancel", variant="stop", elem_id="stop")
        status = gradio.HTML(_line("Press Compare."), elem_id="status")
        with gradio.Row():
            kind = gradio.Video if playground.video else gradio.Image
            more = {"autoplay": True, "loop": True} if playground.video else {"type": "filepath"}
            outputs = [
                kind(label=label, interactive=False, elem_id=label.lower(), buttons=BUTTONS[:1], **more)
                for label in ("Dense", "Accelerated")
            ]
        with gradio.Row():
            about = {"label": "Block mask", "show_label": False, "elem_id": "mask"}  # a label would hide the legend
            mask = gradio.Image(interactive=False, type="filepath", buttons=BUTTONS, **about)
            report = gradio.HTML(elem_id="report", label="Report")
        start.click(playground.ticket, outputs=ticket, queue=False, api_name=False, show_progress="hidden").then(
            follow,
            inputs=[ticket, level, method, cache, prompt, *numbers],
            outputs=[status, *outputs, mask, report],
            concurrency_limit=1,
            show_progress_on=status,
            api_name=False,
        )
        stop.click(cancel, inputs=ticket, outputs=status, queue=False, api_name=False, show_progress="hidden")
    return page


def launch(gradio: Any, page: gradio.Blocks, host: str, port: int | None, *, block: bool) -> str:
    """Serve the page, and return its address; with `block` until Ctrl-C.

    Raises:
        DitAccelError: the address cannot be used.
    """
    from starlette.middleware import Middleware

    page.queue(default_concurrency_limit=1, api_open=False)
    fonts = ["system-ui", "sans-serif"]
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]),
            allowed_paths=[],
            max_file_size=MOST_UPLOAD,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(OwnHost)]},
        )
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise DitAccelError(f"The page cannot be served at {where}: {error}. Give another --host or --port.") from error
    if block:
        print(f"serving {page.title} at {address} until Ctrl-C", flush=True)
        page.block_thread()
    return address


class OwnHost:
    """ASGI middleware: answers carry a policy by which the browser asks no other host."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, guarded)


def _line(text: str, *, failed: bool = False) -> str:
    style = ' style="color: #b00020"' if failed else ""
    return f'<p role="status"{style}>{html.escape(" ".join(text.split()))}</p>'
