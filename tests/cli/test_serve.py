"""`dit-accel serve`: comparisons, one at a time, and the page that shows them."""

import os
import shutil
import socket
import sys
import threading
import urllib.error
import urllib.request

import imageio.v2
import pytest
import torch
from messages import says

from dit_accel.cli.playground import Cancelled, Playground
from dit_accel.errors import DitAccelError
from dit_accel.generation.request import ModelRequest

SMALL = {"frames": 5, "height": 32, "width": 48, "steps": 3}
METHOD = {"prompt": "a red circle", "method": "gna:window=0.5", "seed": 1}


def ignore(title, done, total):
    pass


def compare(playground, show=ignore, **values):
    return playground.compare(playground.ticket(), METHOD | values, show)


@pytest.fixture
def playground(demo_folder, tmp_path):
    return Playground(ModelRequest(model=str(demo_folder), guidance=1.0, **SMALL), tmp_path)


def test_a_comparison_has_videos_times_likeness_mask_and_report(playground, tmp_path):
    steps = []
    comparison = compare(playground, lambda *step: steps.append(step))
    assert [step[1:] for step in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)] * 2
    assert steps[0][0] == "dense" and steps[-1][0].startswith("gna")
    assert sorted(tmp_path.iterdir()) == sorted([comparison.dense, comparison.accelerated, comparison.mask])
    assert [len(imageio.v2.mimread(path)) for path in (comparison.dense, comparison.accelerated)] == [5, 5]
    assert says(comparison.likeness, "PSNR dB SSIM") and "<table>" in comparison.report


def test_the_dense_output_of_the_same_call_is_used_again(playground):
    first = compare(playground).dense.read_bytes()
    titles = []
    again = compare(playground, lambda *step: titles.append(step[0]), method="radial:decay=0.5")
    assert again.dense.read_bytes() == first and "dense" not in titles and again.remarks
    compare(playground, lambda *step: titles.append(step[0]), seed=2)
    assert "dense" in titles


def test_cancel_stops_at_the_next_step_and_leaves_the_model_in_order(playground):
    before = compare(playground, cache="first-block:threshold=0.3").accelerated.read_bytes()
    state = {name: value.clone() for name, value in playground.pipe.transformer.state_dict().items()}
    for title in ("dense", "gna"):
        ticket, steps = playground.ticket(), []

        def show(now, done, total, ticket=ticket, steps=steps, title=title):
            steps.append(done)
            if now.startswith(title) and done == 1:
                assert playground.cancel(ticket)

        with pytest.raises(Cancelled):
            playground.compare(ticket, METHOD | {"seed": 5 + len(title)}, show)
        assert steps[-1] == 1, "no step came after the one that runs"
        assert not playground.cancel(ticket)
    after = playground.pipe.transformer.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    assert compare(playground, cache="first-block:threshold=0.3").accelerated.read_bytes() == before


def test_one_at_a_time_and_who_waits_can_be_cancelled(playground):
    begun, go, ends = threading.Event(), threading.Event(), []

    def hold(title, done, total):
        begun.set()
        assert go.wait(60)

    first = threading.Thread(target=lambda: ends.append(compare(playground, hold)))
    first.start()
    assert begun.wait(60)
    ticket = playground.ticket()

    def wait():
        with pytest.raises(Cancelled):
            playground.compare(ticket, METHOD, lambda *step: ends.append("ran"))
        ends.append("cancelled")

    second = threading.Thread(target=wait)
    second.start()
    assert playground.cancel(ticket)
    go.set()
    for thread in (first, second):
        thread.join(60)
    assert len(ends) == 2 and ends[1] == "cancelled"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "gnu"}, "gnu gna"),
        ({"method": "gna:window=-1"}, "window"),
        ({"method": "sparge:budgets=/etc/hostname"}, "budgets"),
        ({"method": "tile: layers = /etc/hostname"}, "layers"),
        ({"method": "sol dense_backend=flash_hub"}, "dense_backend"),
        ({"frames": 4}, "frames"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"cache": "none-such"}, "none-such"),
        ({"level": "fast"}, "--method"),
    ],
)
def test_bad_input_is_refused_before_any_step(playground, values, words):
    with pytest.raises(DitAccelError) as refused:
        compare(playground, lambda *step: pytest.fail("a step ran"), **values)
    assert says(str(refused.value), words)


def test_without_gradio_the_error_names_the_extra(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    outcome = cli("serve", "--model", "demo")
    assert outcome.status == 2 and "pip install 'dit_accel[playground]'" in outcome.err


@pytest.fixture
def address(demo_folder, tmp_path):
    """A page that is served in this process."""
    gradio = pytest.importorskip("gradio", reason="needs Gradio: pip install 'dit_accel[playground]'")
    from dit_accel.cli.serve import PageOptions, start

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield start(PageOptions(model=str(demo_folder), guidance=1.0, port=port, **SMALL), tmp_path, block=False)
    gradio.close_all()


def status_of(address: str, path: str, **request) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, **request), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_is_local_and_gives_no_files(address, root):
    assert address.startswith("http://127.0.0.1:") and status_of(address, "") == 200
    for path in (root / "pyproject.toml", "/etc/hostname", root / ".git" / "config", os.path.abspath("README.md")):
        assert status_of(address, f"gradio_api/file={path}") == 403, path
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
    upload = {"data": body, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    assert status_of(address, "gradio_api/upload", **upload) == 413


@pytest.fixture
def tab(address):
    """The page in a headless Chromium, and the hosts it asked."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium, such as Debian's package chromium")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1100, "height": 1250})
        page.set_default_timeout(90_000)
        page.goto(address)
        yield page
        chromium.close()


def test_in_a_browser(tab, address):
    """A video is made, cancel works, bad input is answered in the page, and no other host gave anything."""
    answered = []
    tab.on("response", lambda response: answered.append(response.url))
    status = tab.locator("#status [role=status]")
    tab.get_by_text("Press Compare").wait_for()

    def fill(name, text):
        tab.locator(f"#{name} :is(input, textarea)").fill(text)
        tab.locator(f"#{name} :is(input, textarea)").blur()

    def ends_with(words):
        tab.wait_for_function(
            "words => document.querySelector('#status [role=status]')?.innerText.includes(words)", arg=words
        )

    tab.get_by_label("a method").check()
    fill("method", "gna:window=0.5")
    tab.locator("#start").click()
    ends_with("PSNR")
    assert tab.locator("video").count() == 2 and tab.locator("#mask img").count() == 1
    played = "Array.from(document.querySelectorAll('video')).map(video => video.videoWidth > 0 && video.error === null)"
    tab.wait_for_function(f"{played}.every(Boolean)")
    if folder := os.environ.get("DIT_ACCEL_PICTURE"):
        tab.screenshot(path=folder)

    fill("method", "gnu")
    tab.locator("#start").click()
    ends_with("gnu")
    assert status.inner_text().startswith("error: ") and "\n" not in status.inner_text()

    fill("method", "gna:window=0.5")
    fill("steps", "5000")
    tab.locator("#start").click()
    tab.get_by_text("of 5000").first.wait_for()
    tab.locator("#stop").click()
    ends_with("Cancelled")
    fill("steps", "2")
    tab.locator("#start").click()
    ends_with("PSNR")
    assert answered and all(url.startswith((address, "data:", "blob:")) for url in answered), answered
