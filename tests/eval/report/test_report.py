"""The report's numbers, Markdown and files."""

import json
import math
import shutil

import pytest
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.eval.report import NAMES, fields, markdown, page, pictures, write_report


def test_numbers_are_written_for_people():
    assert fields.written(21.456789, "dB") == "21.46 dB"
    assert fields.written("inf", "dB") == "∞ dB"
    assert fields.written(-0.00123456) == "−0.001235"
    assert fields.written(None) == "–"
    assert fields.interval([19.513, "inf"]) == " (95 %: 19.5 to ∞)"
    assert fields.interval([0.5, 0.5], "{}–{}") == fields.interval(None) == ""
    assert fields.memory(300 * 2**20) == "300 MiB" and fields.memory(3 * 2**29) == "1.50 GiB"
    assert fields.written(90.625, "%") == "90.6 %" == fields.cell(90.625, {"unit": "%"})
    assert fields.cell(21.456789, {"unit": "dB"}) == "21.46"
    assert fields.share(0.125) == "12.5 %" and fields.times(1.5) == "1.50×"
    assert fields.seconds({"p50": 1.0, "p95": 2.5}) == "1.000 / 2.500"


def front_by_hand(points, sign):
    """Labels of points (speed, value, label) for which no other is better in one and at least as good in the other."""
    front = []
    for speed, value, label in points:
        rivals = [(a, sign * b) for a, b, other in points if other != label]
        if not any((a > speed and b >= sign * value) or (a >= speed and b > sign * value) for a, b in rivals):
            front.append((speed, label))
    return [label for _, label in sorted(front)]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_front_is_what_nothing_beats(better):
    metric = {"name": "m", "better": better}
    points = [
        (1.0, "inf", "a"),
        (1.5, 20.0, "b"),
        (1.5, 21.0, "c"),
        (1.2, 19.0, "d"),
        (2.0, -1.0, "e"),
        (2.0, -1.0, "f"),
    ]
    rows = [{"label": label, "speedup": speed, "figures": {"m": {"value": value}}} for speed, value, label in points]
    rows += [
        {"label": "unknown", "speedup": 9.0, "figures": {}},
        {"label": "untimed", "speedup": None, "figures": {"m": {"value": 99}}},
    ]
    expected = front_by_hand([(s, float(v), name) for s, v, name in points], 1 if better == "higher" else -1)
    assert fields.front(rows, metric) == expected
    assert expected == (["a", "c", "e", "f"] if better == "higher" else ["e", "f"])


def test_markdown_has_the_verdict_and_a_line_for_each_row(summary):
    text = markdown.render(summary)
    table = [line for line in text.splitlines() if "| `" in line]
    assert [line.split("`")[1] for line in table] == [row["label"] for row in summary["rows"]]
    assert table[1].split(" | ")[1:3] == ["30.0 %", "1.50× (1.35 to 1.65)"] and "| ∞ |" in table[0]
    assert text.index("## What to use") < text.index("## Figures")
    assert "* The best: <b>gna:window=0.7</b>.\n  `dit-accel generate 'a b'`\n* No setting" in text
    assert "* versions: torch 2.13" in text and "* git: –" in text


def test_files_are_written_together_and_the_page_holds_everything(summary, media, tmp_path):
    shutil.copytree(media, tmp_path / "media")
    write_report(summary, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, "media"}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    html = (tmp_path / "report.html").read_text()
    assert html.count('src="data:video/mp4;base64,') == 2 and html.count('src="data:image/png;base64,') == 3
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in html and "<b>red" not in html
    assert html.count(">softmax mass kept</text>") == 2 and "<code>baseline</code> ran dense throughout" in html
    assert "{{" not in html and "{%" not in html
    first = {name: (tmp_path / name).read_bytes() for name in NAMES}
    write_report(summary, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == first

    (tmp_path / "media" / "gna.mp4").unlink()
    with pytest.raises(DitAccelError, match=names("gna.mp4")):
        write_report({**summary, "title": "new"}, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == first
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, "media"}


def test_what_cannot_be_shown_is_refused(summary, tmp_path):
    with pytest.raises(DitAccelError, match=names("sample.avi")):
        page.embedded(tmp_path / "sample.avi")
    with pytest.raises(ValueError, match=names("JSON")):
        write_report({**summary, "made": {"loss": math.nan}}, tmp_path)


def test_pictures_take_the_pages_colours_and_know_gaps(summary):
    svg = pictures.panel(summary, summary["metrics"][0])
    assert "currentColor" in svg and pictures.INK not in svg
    names = fields.names(summary["rows"]).values()
    assert [*names] == ["baseline", "gna window=0.5", "gna window=0.7", "radial"]
    assert [name for name in names if f">{name}</text>" not in svg] == []
    marks = pictures.marks(summary)
    assert marks["gna:window=0.5"] == marks["gna:window=0.7"] and len(set(marks.values())) == 3
    assert pictures.drawable(summary) == summary["metrics"]
    assert pictures.pareto(summary).startswith(b"\x89PNG")
    assert ">blocks.2</text>" in pictures.heat_maps(summary["attention"][0])


def test_a_point_far_out_does_not_stretch_the_axis(summary):
    rows = [
        {**summary["rows"][1], "label": str(psnr), "figures": {"psnr": {"value": psnr}}} for psnr in (20, 21, 22, 24)
    ]
    low, high = pictures._limits([20.0, 21.0, 22.0, 24.0, 500.0])
    assert 19 < low < 20 and 24 < high < 25
    rows.append({**rows[0], "label": "far", "figures": {"psnr": {"value": 500.0}}})
    assert ">far: 500 dB</text>" in pictures.panel({**summary, "rows": rows}, summary["metrics"][0])


def test_infinity_is_a_line_above_all_other_values(summary):
    """The line and its label are on the plot where a row is infinite, and the row's point lies on the line."""
    from matplotlib.figure import Figure

    axes, named = pictures._front_panel(Figure().subplots(), summary, summary["metrics"][0])
    top = axes.get_ylim()[1]
    assert [at for *_, at, name in named if name == "baseline"] == [top]
    assert max(at for *_, at, name in named if name != "baseline") < top
    assert [text.get_text() for text in axes.texts] == ["∞"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [top]
    axes, _ = pictures._front_panel(Figure().subplots(), summary, summary["metrics"][1])
    assert not axes.texts and all(line.get_linestyle() != "--" for line in axes.lines)


def test_names_of_points_cover_each_other_nowhere(summary):
    """Seven rows whose points lie near each other: every name is beside its point, and free."""
    from matplotlib.figure import Figure

    rows = [
        {**summary["rows"][1], "label": f"gna:window={i}", "speedup": 1.2 + 0.01 * (i % 3)}
        | {"figures": {"psnr": {"value": 20 + 0.1 * i}}}
        for i in range(7)
    ]
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes, named = pictures._front_panel(figure.subplots(), {**summary, "rows": rows}, summary["metrics"][0])
    pictures._name_points(figure, [(axes, named)])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [f"gna window={i}" for i in range(7)]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def grid(summary, caches):
    """Rows of dense attention and two methods, without a cache and with each of the caches."""
    rows = []
    for at, cache in enumerate(("", *(f" cache={cache}" for cache in caches))):
        for row in summary["rows"]:
            method = "dense" if row is summary["rows"][0] and cache else row["label"]
            rows.append({**row, "label": method + cache, "speedup": row["speedup"] + at})
    return rows


def test_a_grid_has_a_line_for_each_cache_and_a_marker_for_each_method(summary):
    """Four methods without and with two caches: a legend in place of names, and figures at points far out alone."""
    from matplotlib.figure import Figure

    caches = ["steps:computed=0x1x4", "mag:threshold=0.06"]
    whole = {**summary, "rows": grid(summary, caches)}
    cells = fields.crossed(whole["rows"])
    assert cells["baseline"] == ("dense", "uncached") and cells[f"dense cache={caches[0]}"] == ("dense", caches[0])
    assert len(set(cells.values())) == 12 and [len(names) for names in fields.titles(cells)] == [4, 3]
    marks = pictures.marks(whole)
    assert {len({marks[label][part] for label in cells}) for part in (0, 1)} == {3, 4}
    axes, named = pictures._front_panel(Figure().subplots(), whole, summary["metrics"][1])
    lines = [line for line in axes.lines if line.get_color() in {colour for colour, _ in marks.values()}]
    assert named == [] and [len(line.get_xdata()) for line in lines if line.get_linestyle() == "-"] == [4, 4, 4]
    first, other = (pictures.panel(whole, metric) for metric in summary["metrics"][:2])
    for title in ("uncached", "steps", "mag", "radial", "gna window=0.5", "Pareto front"):
        assert first.count(f">{title}</text>") == 1 and f">{title}</text>" not in other


def test_rows_that_are_no_grid_keep_their_names(summary):
    """One cache with one method, or two rows of the same method and cache, are no grid."""
    assert fields.crossed(summary["rows"]) == {}
    rows = [*summary["rows"], {**summary["rows"][1], "label": "gna:window=0.5 cache=mag"}]
    assert fields.crossed(rows) == {}
    rows = grid(summary, ["mag"])
    assert len(fields.crossed(rows)) == 8
    assert fields.crossed([*rows, {**rows[0], "label": "dense"}]) == {}


def test_the_first_panel_is_the_largest(summary):
    """In the PNG the first panel has the area of four, and the page draws it twice as wide."""
    import io

    from PIL import Image

    def width(metric):
        return float(pictures.panel(summary, metric).partition('width="')[2].partition("pt")[0])

    first, *others = summary["metrics"]
    assert [width(metric) for metric in others] == [width(first) / pictures.LARGE] * len(others)
    with Image.open(io.BytesIO(pictures.pareto(summary))) as picture:
        wanted = [120 * pictures.PANEL[0] * 3, 120 * (pictures.PANEL[1] * 2 + 0.3)]
        assert list(picture.size) == [round(side) for side in wanted]


def test_means_leave_gaps_out():
    import numpy as np

    values = np.array([[[1.0, 3.0], [math.nan, math.nan]]])
    assert pictures._mean(values, 2).tolist()[0][0] == 2.0 and math.isnan(pictures._mean(values, 2)[0, 1])
    assert pictures._mean(values, 1).tolist() == [[1.0, 3.0]]


def test_an_axis_with_an_infinite_figure_has_ticks_at_the_finite_ones(root):
    """The baseline's PSNR is infinite; the others lie between ticks that a reader can read."""
    from matplotlib.figure import Figure

    summary = json.loads((root / "benchmarks/results/eval_demo_levels.json").read_text(encoding="utf-8"))
    axes = Figure().subplots()
    pictures._front_panel(axes, summary, next(metric for metric in summary["metrics"] if metric["name"] == "psnr"))
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3
