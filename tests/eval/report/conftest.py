"""A small summary with real media, and a Chromium driven over a pipe."""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time

import numpy as np
import pytest

from dit_accel.files import MARK

SILENCE = 120  # seconds after which Chromium hangs

METRICS = [
    {"name": "psnr", "title": "PSNR", "unit": "dB", "better": "higher", "about": "against the dense output"},
    {
        "name": "perceptual[demo-clip]",
        "title": "perceptual[demo-clip]",
        "unit": "",
        "better": "lower",
        "about": "lower",
    },
    {"name": "fid[demo-clip]", "title": "fid[demo-clip]", "unit": "", "better": "lower", "about": "features"},
]


def row(label, density, speedup, psnr, perceptual):
    return {
        "label": label,
        "method": label.partition(":")[0],
        "config": {},
        "density": density,
        "command": f"dit-accel generate --method {label}",
        "speedup": speedup,
        "speedup_interval": [0.9 * speedup, 1.1 * speedup],
        "attention_speedup": None,
        "loop_seconds": {"p50": 4.0 / (speedup or 1), "p95": 4.4},
        "attention_seconds": None,
        "peak_bytes": 300 * 2**20,
        "samples": 4,
        "figures": {
            "psnr": {"value": psnr, "interval": [psnr, psnr] if psnr == "inf" else [19.5, 25.0], "samples": 4},
            "perceptual[demo-clip]": {"value": perceptual, "interval": [0.05, 0.35], "samples": 4},
            "fid[demo-clip]": {"value": 9.5 if perceptual else 0.0},
        },
    }


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder with a video and an image of two rows."""
    import imageio.v2
    from PIL import Image

    folder = tmp_path_factory.mktemp("report") / "media"
    folder.mkdir()
    for name, shift in (("baseline", 0), ("gna", 3)):
        ramp = (np.arange(64)[None, :, None] * 3 + np.zeros((64, 64, 3))).astype(np.uint8)
        frames = [np.roll(ramp, 2 * i + shift, axis=1) for i in range(9)]
        imageio.v2.mimwrite(folder / f"{name}.mp4", frames, fps=8, codec="libx264", macro_block_size=1)
        Image.fromarray(frames[0]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def summary():
    """Three methods beside the baseline, videos of two rows for one prompt, images of two rows for another."""
    figures = {"psnr": 21.5}
    samples = [
        {"row": "baseline", "prompt": "a <b>red</b> circle", "seed": 0, "media": "media/baseline.mp4", "figures": {}},
        {
            "row": "gna:window=0.5",
            "prompt": "a <b>red</b> circle",
            "seed": 0,
            "media": "media/gna.mp4",
            "figures": figures,
        },
        {"row": "baseline", "prompt": "a still", "seed": 1, "media": "media/baseline.png", "figures": {}},
        {"row": "gna:window=0.5", "prompt": "a still", "seed": 1, "media": "media/gna.png", "figures": figures},
    ]
    layers = [f"transformer.blocks.{i}.attn1" for i in range(3)]
    cells = [[[0.1 * i, 0.2] if i else None, [0.1, 0.3 * i]] for i in range(3)]
    return {
        "note": MARK,
        "title": "Quality and speed of demo",
        "made": {
            "command": "dit-accel eval",
            "model": "demo",
            "seeds": [0, 1],
            "prompts": ["a <b>red</b> circle", "a still"],
        }
        | {"versions": {"torch": "2.13"}, "hardware": "a processor", "git": None},
        "metrics": METRICS,
        "rows": [
            row("baseline", 1.0, 1.0, "inf", 0.0),
            row("gna:window=0.5", 0.3, 1.5, 21.5, 0.2),
            row("gna:window=0.7", 0.5, 1.2, 20.5, 0.3),
            row("radial:decay=1.0", 0.4, 1.3, 24.0, 0.1),
        ],
        "verdict": [
            {
                "text": "The best: <b>gna:window=0.7</b>.",
                "row": "gna:window=0.7",
                "command": "dit-accel generate 'a b'",
            },
            {"text": "No setting reaches 9 times."},
        ],
        "samples": samples,
        "masks": [{"row": "gna:window=0.5", "image": "media/gna.png"}],
        "attention": [
            {"row": "gna:window=0.5", "steps": [0, 8], "layers": layers, "error": cells, "mass": cells, "queries": 16},
            {"row": "baseline", "steps": [], "layers": layers, "error": [[]] * 3, "mass": [[]] * 3, "queries": 16},
        ],
    }


class Page:
    """A page of headless Chromium, driven by the DevTools protocol over file descriptors 3 and 4."""

    def __init__(self, browser, to, back):
        self.browser, self._to, self._back = browser, to, back
        self._buffer, self._count, self._session = b"", 0, None
        self._loaded = set()  # documents, by their loader
        self.complaints = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def send(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            assert select.select([self._back], [], [], SILENCE)[0], "Chromium says nothing any more"
            part = os.read(self._back, 1 << 20)
            assert part, "Chromium ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(message)
        self._note(event.get("method"), event.get("params", {}))
        return event

    def _note(self, method, params):
        """Keep which documents are loaded, what the console would show in red, and requests that leave the page."""
        if method == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.add(params["loaderId"])
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"])
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(params["args"])
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"])
        if method == "Network.requestWillBeSent" and params["request"]["url"].partition(":")[0] not in ("data", "file"):
            self.complaints.append(params["request"]["url"])

    def open(self, path, width, height=800, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=theme)
        document = self.send("Page.navigate", url=path.as_uri())["loaderId"]
        while document not in self._loaded:  # its event may come before the answer, and one of the page before after it
            self._receive()

    def ask(self, expression):
        """The value of a JavaScript expression, awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression):
        """Until an expression is true."""
        end = time.monotonic() + SILENCE
        while not self.ask(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.1)

    def screenshot(self, path):
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))


@pytest.fixture(scope="module")
def chromium():
    """A page of a fresh headless Chromium; skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is on the PATH")
    flags = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--mute-audio"]
    flags += ["--disable-dev-shm-usage"]  # which is small in containers
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    with contextlib.ExitStack() as stack:
        profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        commands, answers = os.pipe(), os.pipe()  # commands to Chromium, answers from it
        script = f'exec "$0" "$@" 3<&{commands[0]} 4>&{answers[1]}'
        command = ["bash", "-c", script, program, *flags, f"--user-data-dir={profile}"]
        browser = subprocess.Popen(command, pass_fds=(commands[0], answers[1]), stderr=subprocess.DEVNULL)
        os.close(commands[0])
        os.close(answers[1])
        try:
            yield Page(browser, commands[1], answers[0])
        finally:
            browser.kill()
            browser.wait()
            os.close(commands[1])
            os.close(answers[0])


@pytest.fixture
def pictures_folder(tmp_path):
    """Where screenshots go: DIT_ACCEL_SCREENSHOTS if set, so that a person can look at them."""
    return pathlib.Path(os.environ.get("DIT_ACCEL_SCREENSHOTS", tmp_path))
