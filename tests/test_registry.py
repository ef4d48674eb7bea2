"""Methods and settings by name."""

import dataclasses
import pathlib
import sys

import pytest
import torch
from messages import names

import dit_accel
from dit_accel import registry
from dit_accel.errors import DitAccelError
from dit_accel.tokens import TokenGrid


def test_methods_are_found_by_their_files():
    folder = pathlib.Path(dit_accel.__file__).parent / "methods"
    names = sorted({path.stem for path in folder.glob("*.py")} - {"__init__", "settings"})
    assert dit_accel.list_methods() == names
    for name, method in registry.get_methods().items():
        assert method.name == name
        assert method.summary
        assert method.source
        assert dataclasses.is_dataclass(method.config)


def test_the_documents_say_when_to_choose_a_method():
    """README.md and docs/methods.md have a row for each method, which begins with what `dit-accel ls` says of it."""
    root = pathlib.Path(__file__).parent.parent
    readme, page = (
        {cells[0].strip("` "): [cell.strip() for cell in cells[1:]] for cells in rows if len(cells) == columns}
        for text, columns in ((root / "README.md", 2), (root / "docs" / "methods.md", 7))
        for rows in [[line.strip("|").split("|") for line in text.read_text(encoding="utf-8").splitlines()]]
    )
    for name, method in registry.get_methods().items():
        assert method.good_for and readme[name][0].startswith(method.good_for)
        assert ("experimental" in readme[name][0]) == method.experimental
        if name != registry.DENSE:
            _, _, training, _, _, good_for = page[name]
            assert good_for.startswith(method.good_for)
            assert ("needed" in training) == method.needs_training
            assert ("experimental" in training) == method.experimental


def test_unknown_names_come_with_a_suggestion():
    with pytest.raises(DitAccelError, match=names("'radail'", "'radial'")):
        registry.get_method("radail")
    with pytest.raises(DitAccelError, match=names("gna", "'windw'", "'window'")):
        dit_accel.plan("gna", TokenGrid(1, 4, 4), windw=3)
    with pytest.raises(DitAccelError, match="tile:references=2"):
        dit_accel.plan("tile", TokenGrid(1, 4, 4))
    with pytest.raises(DitAccelError, match=names("dense", "'window'")):
        dit_accel.plan("dense", TokenGrid(1, 4, 4), window=3)


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("gna:window=18x24x24,stride=4", [], {"window": (18, 24, 24), "stride": 4}),
        ("gna:window=0.5", ["causal=truexfalsexfalse"], {"window": 0.5, "causal": (True, False, False)}),
        ("gna", ["window=fullx0.5x3"], {"window": ("full", 0.5, 3)}),
        ("gna:window=4", ["window=8"], {"window": 8}),
        ("radial:decay=0.2,sink=false,rule=released", [], {"decay": 0.2, "sink": False, "rule": "released"}),
        ("radial:decay=1e-1", [], {"decay": 0.1}),
        ("dense", [], {}),
    ],
)
def test_settings_are_parsed(text, settings, expected):
    name, parsed = registry.parse_method(text, settings)
    assert name == text.partition(":")[0]
    assert parsed == expected
    assert {key: type(value) for key, value in parsed.items()} == {k: type(v) for k, v in expected.items()}
    registry.make_config(name, parsed)


@pytest.mark.parametrize("item", ["window", "=3", "window="])
def test_malformed_settings_are_refused(item):
    with pytest.raises(DitAccelError, match="key=value"):
        registry.parse_method("gna", [item])


@pytest.mark.parametrize(("text", "settings"), [("gna:window=3,window=5", []), ("gna", ["window=3", "window = 5"])])
def test_a_setting_given_twice_is_refused(text, settings):
    with pytest.raises(DitAccelError, match=names("window", "gna")):
        registry.parse_method(text, settings)


def test_configs_survive_json_lists():
    config = registry.make_config("gna", {"window": [2, 3, 4], "stride": [1, 2, 1]})
    assert config.window == (2, 3, 4)
    assert config == registry.make_config("gna", dataclasses.asdict(config))


@pytest.mark.parametrize("name", registry.get_methods())
def test_configs_are_frozen(name):
    settings = {"gna": {"window": 2}, "tile": {"references": 1}}.get(name, {})
    config = registry.make_config(name, settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1


OUTSIDE = '''
"""Every token sees its own frame."""

import dataclasses

import torch

from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.static import MaskPlan
from dit_accel.method import Method, MethodConfig


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """No settings."""


def make_plan(grid, config):
    own = torch.arange(grid.frames)
    frames = AxisTable(own, own + 1)
    height, width = (AxisTable.full(length) for length in (grid.height, grid.width))
    return MaskPlan("own_frame", config, grid, Mask((Product(frames, height, width),)))


METHOD = Method("own_frame", Config, make_plan, "each frame by itself", source="-", good_for="tests")
'''


def test_a_static_method_is_added_by_one_file(tmp_path, monkeypatch):
    """A file on the path of the package `methods` is enough to plan, attend and accelerate."""
    from dit_accel import methods

    (tmp_path / "own_frame.py").write_text(OUTSIDE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    registry.get_methods.cache_clear()
    try:
        assert "own_frame" in dit_accel.list_methods()
        plan = dit_accel.plan("own_frame", TokenGrid(3, 2, 4))
        assert plan.pairs == 3 * 8**2
        q, k, v = torch.randn(3, 1, 2, 24, 8).unbind()
        frames = [x.unflatten(2, (3, 8)) for x in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(*frames).flatten(2, 3)
        torch.testing.assert_close(dit_accel.attention(q, k, v, plan), alone)
    finally:
        registry.get_methods.cache_clear()
        sys.modules.pop("dit_accel.methods.own_frame", None)
