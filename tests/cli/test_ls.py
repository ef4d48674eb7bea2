"""`dit-accel ls`."""

import json

import dit_accel


def test_json_lists_every_method_and_family(cli):
    listed = json.loads(cli("ls", "--json").out)
    assert [method["name"] for method in listed["methods"]] == dit_accel.list_methods()
    assert [family["name"] for family in listed["families"]] == dit_accel.list_families()
    assert "linear already" in listed["refused"]["SanaTransformer2DModel"]
    assert listed["embedded"] == ["demo"]


def test_json_settings_are_the_configs(cli):
    methods = {method["name"]: method for method in json.loads(cli("ls", "--json").out)["methods"]}
    window, stride = methods["gna"]["settings"][:2]
    assert window == {"name": "window", "default": None, "required": True}
    assert stride == {"name": "stride", "default": 1, "required": False}
    assert methods["sla"]["learns"] and not methods["radial"]["learns"]


def test_recommended_settings_are_shown_with_their_source(cli):
    families = {family["name"]: family for family in json.loads(cli("ls", "--json").out)["families"]}
    radial = families["wan"]["recommended"]["radial"]
    assert radial["config"] == {"decay": 0.2, "rule": "released"}
    assert radial["schedule"] == {"dense_steps": 0.24, "dense_layers": 1}
    assert "scripts/wan_t2v_inference.sh" in radial["source"]
    pair = families["wan"]["recommended_pair"]["radial"]
    assert (pair["config"]["decay"], pair["schedule"]["dense_steps"]) == (0.8, 11 / 40)


def test_table_says_where_methods_come_from(cli):
    out = cli("ls").out
    assert "arXiv:2504.16922" in out
    assert "demo" in out
    assert "SanaTransformer2DModel" in out
