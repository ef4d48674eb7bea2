"""Methods and settings by name."""

import dataclasses

import pytest

import dit_accel
from dit_accel import registry
from dit_accel.errors import DitAccelError
from dit_accel.tokens import TokenGrid


def test_methods_are_found_by_their_files():
    assert dit_accel.list_methods() == ["dense", "gna", "radial", "sla", "tile"]
    for name, method in registry.get_methods().items():
        assert method.name == name
        assert method.summary
        assert method.source
        assert dataclasses.is_dataclass(method.config)


def test_unknown_names_come_with_a_suggestion():
    with pytest.raises(DitAccelError, match=r"Unknown method 'radail'\. Did you mean 'radial'\?"):
        registry.get_method("radail")
    with pytest.raises(DitAccelError, match=r"gna has no setting 'windw'\. Did you mean 'window'\?"):
        dit_accel.plan("gna", TokenGrid(1, 4, 4), windw=3)
    with pytest.raises(DitAccelError, match="gna needs a value for window"):
        dit_accel.plan("gna", TokenGrid(1, 4, 4))
    with pytest.raises(DitAccelError, match=r"dense has no setting 'window'\. It has no settings"):
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
    with pytest.raises(DitAccelError, match="The setting window of gna is given twice"):
        registry.parse_method(text, settings)


def test_configs_survive_json_lists():
    config = registry.make_config("gna", {"window": [2, 3, 4], "stride": [1, 2, 1]})
    assert config.window == (2, 3, 4)
    assert config == registry.make_config("gna", dataclasses.asdict(config))


@pytest.mark.parametrize("name", ["gna", "radial", "tile", "dense", "sla"])
def test_configs_are_frozen(name):
    settings = {"gna": {"window": 2}, "tile": {"references": 1}}.get(name, {})
    config = registry.make_config(name, settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1
