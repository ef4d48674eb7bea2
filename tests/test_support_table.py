"""The committed tables against the tests and the registry that they are made from."""

import pathlib

import pytest
from support_table import (
    BEGIN,
    COLUMNS,
    END,
    README,
    SUMMARISED,
    TABLE,
    checks_of,
    read_results,
    read_table,
    with_summary,
    write_summary,
    write_table,
)

JUNIT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="check" value="wan/gna/compile"/></properties></testcase>
<testcase name="b"><properties><property name="check" value="wan/gna/cache"/></properties></testcase>
<testcase name="c"><properties><property name="check" value="wan/gna/cache"/></properties><failure/></testcase>
<testcase name="d"><properties><property name="check" value="wan/sla/CFG"/></properties><skipped/></testcase>
<testcase name="e"><properties><property name="check" value="wan/sla/compile"/></properties></testcase>
<testcase name="f"><properties><property name="check" value="wan/sla/exact"/></properties></testcase>
<testcase name="g"><properties><property name="check" value="flux/sla/CFG"/>
<property name="check" value="flux/sla/something else"/></properties></testcase>
</testsuite></testsuites>"""


def test_a_method_needs_all_its_tests_to_pass(tmp_path):
    path = tmp_path / "results.xml"
    path.write_text(JUNIT)
    cells = read_results([path])
    passed = {("wan", "gna", "compile"), ("wan", "sla", "compile"), ("wan", "sla", "exact"), ("flux", "sla", "CFG")}
    assert {cell for cell, good in cells.items() if good} == passed
    text = write_table(cells)
    assert read_table(text) == passed
    assert "| wan | gna, sla | sla |  |  | ✓ |" in text and "something else" not in text


def test_the_committed_table_is_current(collected):
    """Every declared cell names its method; if all tests are collected, every named method has a declared cell."""
    marked = read_table(TABLE.read_text(encoding="utf-8"))
    declared = {cell for item in collected for cell in checks_of(item) if cell[2] in COLUMNS}
    assert not declared - marked, f"run `make support`: {sorted(declared - marked)}"
    if {item.path for item in collected} >= set(pathlib.Path(__file__).parent.rglob("test_*.py")):
        assert marked == declared, f"run `make support`: {sorted(marked - declared)}"


def test_the_readme_has_the_table_that_is_made_now():
    text = README.read_text(encoding="utf-8")
    made = with_summary(text, write_summary(read_table(TABLE.read_text(encoding="utf-8"))))
    assert text == made, "run `python tests/support_table.py`"


def test_the_readmes_table_says_what_the_registry_and_the_results_say():
    rows = {row.split("|")[1]: row for row in write_summary([("wan", "gna", "LoRA")]).splitlines()}
    assert rows["`wan`"].startswith("|`wan`|Wan 2.1 and 2.2")
    assert rows["`wan`"].endswith("|video|radial, rectified, sla, sol, sparge||✓||")
    assert rows["`flux`"].endswith("|image|gna||||")
    assert rows["family"].endswith(f"|{'|'.join(SUMMARISED)}|")


def test_a_readme_without_the_marks_is_refused():
    for text in ("", BEGIN, END, f"{END}{BEGIN}"):
        with pytest.raises(ValueError, match="needs the marks"):
            with_summary(text, "")
    assert with_summary(f"a{BEGIN}\nold\n{END}b", "new") == f"a{BEGIN}\nnew\n{END}b"
