"""The table of what is tested in which family, from results: python tests/support_table.py RESULTS.xml...

The results are JUnit files, as `pytest --junitxml=RESULTS.xml` writes them. A cell has a mark if tests with the marker
`check` show it and all of those passed.
"""

import pathlib
import sys
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "dit_accel" / "pipelines" / "SUPPORT.md"
COLUMNS = {
    "equals masked reference": "the transformer equals itself run with PyTorch's attention under the same token mask",
    "dense is bit-identical": "dense steps and layers are the model's own code, bit for bit, beside sparse calls",
    "removable": "after `remove` processors, hooks, weights and outputs are as they were",
    "compile": "one graph without breaks, whole or block by block",
    "LoRA": "PEFT adapters loaded before and after, fused and unfused",
    "offload": "weights away from the device between calls: module by module, and in groups",
    "cache": "Diffusers' caches skip blocks; the report counts what ran",
    "CFG": "guided samples in one batch equal those computed in turn, with texts of different length",
    "context parallel": "several processes for one sequence (Ulysses) equal one process",
}
YES, NO = "✓", ""

Cells = dict[tuple[str, str, str], bool]  # family, method and column: whether all its tests passed


def checks_of(item):
    """Family, method and column of each marker `check` of a test."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for marker in item.iter_markers("check"):
        family = marker.kwargs["family"] if "family" in marker.kwargs else parameters["tiny"].family
        method = marker.kwargs["method"] if "method" in marker.kwargs else parameters["method"]
        yield family, method, marker.args[0]


def read_results(paths) -> Cells:
    """The cells that tests showed or failed to show."""
    cells: Cells = {}
    for path in paths:
        for case in xml.etree.ElementTree.parse(path).iter("testcase"):
            passed = not any(case.find(bad) is not None for bad in ("failure", "error", "skipped"))
            for entry in case.iter("property"):
                if entry.get("name") == "check":
                    family, method, column = entry.get("value").split("/")
                    if column in COLUMNS:
                        key = family, method, column
                        cells[key] = cells.get(key, True) and passed
    return cells


def write_table(cells: Cells) -> str:
    """Markdown with a row for each family and method."""
    rows = sorted({(family, method) for family, method, _ in cells})
    lines = [
        "# What is tested together",
        "",
        "Made by `make support` from the results of the tests; not edited by hand. Each mark stands for tests on small",
        "random models of the real classes that passed, in which the report showed sparse calls, partial blocks and a",
        "density under 0.9. No mark means: not tested, or not possible with that class in Diffusers.",
        "",
        *(f"- **{column}**: {meaning}" for column, meaning in COLUMNS.items()),
        "",
        "| family | method | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + ":-:|" * len(COLUMNS),
    ]
    for family, method in rows:
        marks = [YES if cells.get((family, method, column)) else NO for column in COLUMNS]
        lines.append(f"| {family} | `{method}` | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


def read_table(text: str) -> Cells:
    """The marked cells of a table."""
    cells: Cells = {}
    for line in text.splitlines():
        family, *marks = [part.strip() for part in line.removeprefix("|").removesuffix("|").split("|")]
        method = marks.pop(0) if marks else ""
        if method.startswith("`"):
            cells |= {
                (family, method.strip("`"), column): True
                for column, mark in zip(COLUMNS, marks, strict=True)
                if mark == YES
            }
    return cells


if __name__ == "__main__":
    TABLE.write_text(write_table(read_results(sys.argv[1:])), encoding="utf-8")
