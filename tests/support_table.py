"""Tables of what is tested in which model family: SUPPORT.md and the one in the README.

    python tests/support_table.py RESULTS.xml...    write both tables from test results
    python tests/support_table.py                   write the README's table again, from SUPPORT.md and the registry

Results are JUnit files that `pytest --junitxml=RESULTS.xml` writes. A method stands in a cell if tests with the marker
`check` show it and all of them passed.
"""

import pathlib
import sys
import xml.etree.ElementTree
from collections.abc import Collection

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "dit_accel" / "pipelines" / "SUPPORT.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
COLUMNS = {
    "exact": "the transformer equals itself run with PyTorch's attention under the same token mask",
    "dense is bit-identical": "dense steps and layers run the model's own code beside sparse calls, bit for bit",
    "removable": "after `remove`, processors, hooks, weights and outputs are as they were",
    "compile": "`torch.compile` makes one graph without breaks, of the model or of each block",
    "LoRA": "PEFT adapters work when loaded before and after, fused and unfused",
    "offload": "weights leave the device between calls, module by module and in groups",
    "cache": "Diffusers' caches skip blocks, and the report counts what ran",
    "CFG": "guided samples in one batch equal those computed in turn, with texts of different length",
    "context parallel": "several processes that share one sequence (Ulysses) equal one process",
}
SUMMARISED = ("compile", "LoRA", "context parallel")  # the README's columns
ALL = "✓"

Cell = tuple[str, str, str]  # family, method and column


def checks_of(item):
    """Yields family, method and column of each marker `check` of a test."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for marker in item.iter_markers("check"):
        family = marker.kwargs["family"] if "family" in marker.kwargs else parameters["tiny"].family
        method = marker.kwargs["method"] if "method" in marker.kwargs else parameters["method"]
        yield family, method, marker.args[0]


def read_results(paths) -> dict[Cell, bool]:
    """Reads, for every cell that tests concern, whether all of those tests passed."""
    cells: dict[Cell, bool] = {}
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


def write_table(cells: dict[Cell, bool]) -> str:
    """Returns SUPPORT.md: a row for each family."""
    lines = [
        "# What is tested together",
        "",
        "`make support` writes this page from test results; nobody edits it. The tests run small random models of the",
        "real classes. In each test the report shows sparse calls, partial blocks and a density under 0.9. The second",
        f"column names the methods that the family's tests use. {ALL} means that all of them passed; otherwise a cell",
        "names those that did. An empty cell means: not tested, or not possible with that class in Diffusers.",
        "",
        *(f"- **{column}**: {meaning}" for column, meaning in COLUMNS.items()),
        "",
        "| family | methods | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + ":-:|" * len(COLUMNS),
    ]
    for family in sorted({family for family, _, _ in cells}):
        methods = sorted({method for other, method, _ in cells if other == family})
        shown = []
        for column in COLUMNS:
            passed = [method for method in methods if cells.get((family, method, column))]
            shown.append(ALL if passed == methods else ", ".join(passed))
        lines.append(f"| {family} | {', '.join(methods)} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def read_table(text: str) -> set[Cell]:
    """Reads back the cells whose tests passed."""
    cells: set[Cell] = set()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]  # below the header and its rule
    for line in rows:
        family, methods, *shown = [part.strip() for part in line.removeprefix("|").removesuffix("|").split("|")]
        for column, cell in zip(COLUMNS, shown, strict=True):
            passed = methods if cell == ALL else cell
            cells |= {(family, method, column) for method in passed.split(", ") if method}
    return cells


def write_summary(passed: Collection[Cell]) -> str:
    """Returns the README's table: a row for each family of the registry."""
    import test_sizes

    from dit_accel.registry import family_of, get_families

    videos = set()
    for name, transformer, vae, *_ in test_sizes.CASES:
        family = family_of([name])
        if family.sizes(transformer, vae).video:
            videos.add(family.name)
    lines = [
        f"|family|models|makes|presets|{'|'.join(SUMMARISED)}|",
        f"|---|---|---|---|{':-:|' * len(SUMMARISED)}",
    ]
    for name, family in get_families().items():
        made = "video" if name in videos else "image"
        marks = [ALL if any(cell[0] == name and cell[2] == column for cell in passed) else "" for column in SUMMARISED]
        row = (f"`{name}`", family.summary, made, ", ".join(sorted(family.recommended)), *marks)
        lines.append(f"|{'|'.join(row)}|")
    return "\n".join(lines)


def with_summary(readme: str, summary: str) -> str:
    """Returns the README with what stands between the marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md needs the marks {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{summary}\n{END}{after}"


if __name__ == "__main__":
    sys.path += [str(ROOT), str(ROOT / "tests" / "pipelines")]
    if len(sys.argv) > 1:
        TABLE.write_text(write_table(read_results(sys.argv[1:])), encoding="utf-8")
    known = read_table(TABLE.read_text(encoding="utf-8"))
    README.write_text(with_summary(README.read_text(encoding="utf-8"), write_summary(known)), encoding="utf-8")
