"""The committed page against the tests and the registry that it is made from."""

import pathlib

from support_table import COLUMNS, TABLE, checks_of, families, read_results, read_table, write_page

JUNIT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="check" value="wan/gna/compile"/></properties></testcase>
<testcase name="b"><properties><property name="check" value="wan/gna/cache"/></properties></testcase>
<testcase name="c"><properties><property name="check" value="wan/gna/cache"/></properties><failure/></testcase>
<testcase name="d"><properties><property name="check" value="wan/sla/CFG"/></properties><skipped/></testcase>
<testcase name="e"><properties><property name="check" value="wan/sla/compile"/></properties></testcase>
<testcase name="f"><properties><property name="check" value="wan/sla/exact"/></properties></testcase>
<testcase name="h"><properties><property name="check" value="wan/mag/step caches"/></properties></testcase>
<testcase name="g"><properties><property name="check" value="flux/sla/CFG"/>
<property name="check" value="flux/sla/something else"/></properties></testcase>
</testsuite></testsuites>"""


def test_a_method_needs_all_its_tests_to_pass(tmp_path):
    path = tmp_path / "results.xml"
    path.write_text(JUNIT)
    cells = read_results([path])
    passed = {
        ("wan", "mag", "step caches"),
        ("wan", "gna", "compile"),
        ("wan", "sla", "compile"),
        ("wan", "sla", "exact"),
        ("flux", "sla", "CFG"),
    }
    assert {cell for cell, good in cells.items() if good} == passed
    text = write_page(passed, cells)
    assert read_table(text) == passed
    assert "| wan | gna, sla | sla |  |  | ✓ |" in text and text.count("| mag |") == 1 and "something else" not in text


def test_the_committed_table_is_current(collected):
    """Every declared cell names its method; if all tests are collected, every named method has a declared cell."""
    marked = read_table(TABLE.read_text(encoding="utf-8"))
    declared = {cell for item in collected for cell in checks_of(item) if cell[2] in COLUMNS}
    assert not declared - marked, f"run `make support`: {sorted(declared - marked)}"
    if {item.path for item in collected} >= set(pathlib.Path(__file__).parent.rglob("test_*.py")):
        assert marked == declared, f"run `make support`: {sorted(marked - declared)}"


def test_the_committed_page_is_the_one_that_is_written_now():
    text = TABLE.read_text(encoding="utf-8")
    cells = read_table(text)
    assert text == write_page(cells, cells), "run `python tests/support_table.py`"


def test_a_family_is_shown_with_what_it_makes_and_its_presets():
    rows = {row.split("|")[1].strip(): row for row in families()}
    assert rows["wan"].startswith("| wan | Wan 2.1 and 2.2")
    assert rows["wan"].endswith("| video | radial, rectified, sla, sol, sparge |")
    assert rows["flux"].endswith("| image | gna |")
