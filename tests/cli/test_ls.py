"""`dit-accel ls`."""

import json
import re
import typing

import pytest
from messages import says

import dit_accel
from dit_accel.pipelines.refused import REFUSED
from dit_accel.registry import get_families, get_methods, make_config, parse_method


def test_json_lists_every_method_and_family(cli):
    listed = json.loads(cli("ls", "--json").out)
    assert [method["name"] for method in listed["methods"]] == dit_accel.list_methods()
    assert [family["name"] for family in listed["families"]] == dit_accel.list_families()
    assert listed["refused"] == REFUSED
    assert listed["embedded"] == ["demo"]


def test_json_settings_are_the_configs(cli):
    methods = {method["name"]: method for method in json.loads(cli("ls", "--json").out)["methods"]}
    (references, *_), (window, *_) = methods["tile"]["settings"], methods["gna"]["settings"]
    assert (references["default"], references["required"]) == (None, True)
    assert (window["name"], window["default"], window["required"]) == ("window", [0.6, 0.5, 0.3], False)
    tau, variance = methods["sol"]["settings"][:2]
    assert tau["range"] and not re.search(r"\d", tau["range"]) and says(variance["range"], "diagonal", "exact")
    assert (tau["ramps"], variance["ramps"]) == (True, False)
    topk = methods["sparge"]["settings"][0]
    documented = " ".join(get_methods()["sparge"].config.__doc__.replace("``", "").split())
    assert topk["name"] == "topk" and f"topk: {topk['help']}" in documented
    block = next(setting for setting in methods["sol"]["settings"] if setting["name"] == "block")
    assert says(block["range"], 1, 1024)
    assert methods["sla"]["needs_training"] and not methods["radial"]["needs_training"]
    assert methods["sla"]["objectives"] == ["gate", "imitation"]
    assert {name for name, method in methods.items() if method["experimental"]} == {"agent", "moh", "scaledit"}


def test_every_setting_has_a_sentence_and_an_example_that_can_be_pasted(cli):
    for method in json.loads(cli("ls", "--json").out)["methods"]:
        hints = typing.get_type_hints(get_methods()[method["name"]].config)
        for setting in method["settings"]:
            name, config = parse_method(setting["example"])
            make_config(name, {"references": 1} | config if name == "tile" else config)
            assert setting["name"] in config and setting["help"], (method["name"], setting)
            if typing.get_origin(hints[setting["name"]]) is typing.Literal:
                assert says(setting["range"], *typing.get_args(hints[setting["name"]]))


def test_a_method_has_a_section_on_its_page(cli, root):
    """And names the families with presets of it."""
    for method in json.loads(cli("ls", "--json").out)["methods"]:
        page = root / method["page"]
        if method["name"] == "dense":
            pages = [page.parent / "methods" / "heads.md"]
        else:
            row = re.search(rf"^\| `{method['name']}` \|.*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
            pages = [page.parent / link for link in re.findall(r"\]\((methods/\w+\.md)\)", row[0])]
        assert len(pages) == 1 and f"\n## `{method['name']}`" in pages[0].read_text(encoding="utf-8")
        presets = {name for name, family in get_families().items() if method["name"] in family.recommended}
        assert set(method["presets"]) == presets


def test_where_to_start_is_said(cli):
    lines = [line for line in cli("ls").out.splitlines() if says(line, "--level")]
    assert len(lines) == 2 and says(lines[0], "videos --level sol --preset") and says(lines[1], "images --level gna")
    assert says(cli("ls", "wan").out, "dit_accel.accelerate(pipe) --level --method sol --preset")
    assert "--preset" not in cli("ls", "pixart").out
    out = cli("ls", "demo").out
    assert says(out, "WanPipeline circle red --level") and "dit-accel generate --model demo" in out


def test_recommended_settings_are_shown_with_their_source(cli):
    families = {family["name"]: family for family in json.loads(cli("ls", "--json").out)["families"]}
    radial = families["wan"]["recommended"]["radial"]
    assert radial["config"] == {"decay": 0.2, "rule": "released"}
    assert radial["schedule"] == {"dense_steps": 0.24, "dense_layers": 1}
    assert "scripts/wan_t2v_inference.sh" in radial["source"]
    pair = families["wan"]["recommended_pair"]["radial"]
    assert (pair["config"]["decay"], pair["schedule"]["dense_steps"]) == (0.8, 11 / 40)


def test_the_list_is_short_and_fits_80_columns(cli):
    """An entry a method and a family, wrapped where it is long."""
    lines = cli("ls").out.splitlines()
    starts = [line for line in lines if line.startswith("  ") and line[2] != " "]
    assert len(starts) == len(dit_accel.list_methods()) + len(dit_accel.list_families())
    assert len(lines) <= 1.5 * len(starts) + 8
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert {*dit_accel.list_methods(), *dit_accel.list_families()} <= {
        line.split()[0] for line in lines if line.strip()
    }
    assert any(says(line, "demo") for line in lines)
    for method in get_methods().values():
        (line,) = [line for line in lines if line.startswith(f"  {method.name} ") and method.good_for[:30] in line]
        assert ("experimental" in line) == method.experimental


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gna", ["arXiv:2504.16922", "window: 0.6x0.5x0.3", "stride: 1", "gna:stride=2"]),
        ("sla", ["topk: 0.05", get_methods()["sla"].good_for, "`dit-accel train`", "gate, imitation"]),
        ("wan", ["WanVACETransformer3DModel", "radial: decay=0.2", "scripts/wan_t2v_inference.sh"]),
        ("ChromaTransformer2DModel", ["flux: ", "gna: "]),
        ("SanaTransformer2DModel", ["SanaTransformer2DModel", REFUSED["SanaTransformer2DModel"]]),
    ],
)
def test_all_about_one(cli, name, wanted):
    out = cli("ls", name).out
    assert all(text in out for text in wanted), out
    assert json.loads(cli("ls", name, "--json").out)["name"] in out


def test_an_unknown_name_suggests_the_nearest(cli):
    outcome = cli("ls", "fluks")
    assert (outcome.status, outcome.out) == (2, "")
    assert says(outcome.err, "'fluks'", "'flux'")
