"""The committed table against the tests that stand behind it."""

import pathlib

from support_table import COLUMNS, TABLE, checks_of, read_results, read_table, write_table

JUNIT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="check" value="wan/gna/compile"/></properties></testcase>
<testcase name="b"><properties><property name="check" value="wan/gna/cache"/></properties></testcase>
<testcase name="c"><properties><property name="check" value="wan/gna/cache"/></properties><failure/></testcase>
<testcase name="d"><properties><property name="check" value="wan/sla/CFG"/></properties><skipped/></testcase>
<testcase name="e"><properties><property name="check" value="flux/sla/CFG"/>
<property name="check" value="flux/sla/something else"/></properties></testcase>
</testsuite></testsuites>"""


def test_a_cell_needs_all_its_tests_to_pass(tmp_path):
    path = tmp_path / "results.xml"
    path.write_text(JUNIT)
    cells = read_results([path])
    passed = {("wan", "gna", "compile"), ("flux", "sla", "CFG")}
    assert {cell for cell, good in cells.items() if good} == passed
    text = write_table(cells)
    assert set(read_table(text)) == passed
    assert "| flux | `sla` |" in text and "something else" not in text


def test_the_committed_table_is_current(collected):
    """Every declared cell has its mark; and, when all tests are collected, every mark has a declared cell."""
    marked = set(read_table(TABLE.read_text(encoding="utf-8")))
    declared = {cell for item in collected for cell in checks_of(item) if cell[2] in COLUMNS}
    assert not declared - marked, f"run `make support`: {sorted(declared - marked)}"
    if {item.path for item in collected} >= set(pathlib.Path(__file__).parent.rglob("test_*.py")):
        assert marked == declared, f"run `make support`: {sorted(marked - declared)}"
