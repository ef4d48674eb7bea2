"""The report's page in a real browser."""

import pytest

from dit_accel.eval.report import write_report

VIDEOS = "document.querySelectorAll('.prompt video')"  # two in the stage, two in the grid


@pytest.fixture(scope="module")
def page(summary, media, tmp_path_factory):
    """A written report, away from its media."""
    write_report(summary, media.parent)
    return (media.parent / "report.html").rename(tmp_path_factory.mktemp("elsewhere") / "report.html")


def test_it_opens_plays_and_slides(chromium, page, pictures_folder):
    chromium.open(page, width=1200)
    assert chromium.ask("document.title") == "Quality and speed of demo"
    assert chromium.ask("[...document.images].every((image) => image.naturalWidth > 0)")
    assert chromium.ask("document.querySelectorAll('.compare:not([hidden])').length") == 2
    chromium.ask("document.querySelector('.play').click()")
    chromium.wait_for(f"[...{VIDEOS}].every((video) => !video.paused && video.currentTime > 0.2)")
    assert chromium.ask("document.querySelector('.play').textContent") == "Pause"
    times = f"[...{VIDEOS}].map((video) => video.currentTime)"
    chromium.wait_for(f"((times) => Math.max(...times) - Math.min(...times) < 0.2)({times})")
    chromium.ask("document.querySelector('.play').click()")
    assert chromium.ask(f"[...{VIDEOS}].every((video) => video.paused)")

    chromium.ask(
        "const time = document.querySelector('.time'); time.value = 500; time.dispatchEvent(new Event('input'))"
    )
    chromium.wait_for(f"[...{VIDEOS}].every((video) => Math.abs(video.currentTime / video.duration - 0.5) < 0.05)")
    chromium.ask("const b = document.querySelector('.border'); b.value = 25; b.dispatchEvent(new Event('input'))")
    clipped = "getComputedStyle(document.querySelector('.stage').children[1]).clipPath"
    assert chromium.ask(clipped) == "inset(0px 0px 0px 25%)"
    chromium.ask("const r = document.querySelector('.right'); r.value = 0; r.dispatchEvent(new Event('change'))")
    assert chromium.ask(f"{VIDEOS}[0].src === {VIDEOS}[1].src")
    chromium.screenshot(pictures_folder / "wide.png")
    assert chromium.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_usable_on_a_phone(chromium, page, pictures_folder, dark):
    """Nothing but the table and the heat maps is wider than the screen, and what is pressed is large enough."""
    chromium.open(page, width=360, height=740, dark=dark)
    assert chromium.ask("document.documentElement.scrollWidth") == 360
    assert chromium.ask("document.querySelector('table').parentElement.clientWidth <= 360")
    small = (
        "[...document.querySelectorAll('button, select, input')].filter((e) => e.offsetParent && e.offsetHeight < 24)"
    )
    assert chromium.ask(f"{small}.length") == 0
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    assert (chromium.ask(brightness) < 300) == dark
    text = "getComputedStyle(document.querySelector('svg text')).fill === getComputedStyle(document.body).color"
    assert chromium.ask(text)
    chromium.screenshot(pictures_folder / f"phone-{'dark' if dark else 'light'}.png")
    assert chromium.complaints == []


@pytest.mark.parametrize("width", [1400, 800])
def test_no_column_is_cut_off(chromium, page, width):
    """The table fits at 1,400 pixels; on a narrower screen it scrolls."""
    chromium.open(page, width=width)
    box = "document.querySelector('.wide')"
    fits = chromium.ask(f"{box}.scrollWidth <= {box}.clientWidth")
    assert fits or (width < 1400 and chromium.ask(f"getComputedStyle({box}).overflowX") == "auto")


def test_a_broken_page_is_noticed(chromium, tmp_path):
    """The guard itself: an error in a script and a request to the network are complaints."""
    broken = tmp_path / "broken.html"
    broken.write_text("<script>nowhere()</script><img src='http://127.0.0.1:9/x.png'>")
    chromium.open(broken, width=800)
    complaints = str(chromium.complaints)
    chromium.complaints.clear()
    assert "nowhere is not defined" in complaints and "127.0.0.1:9" in complaints
