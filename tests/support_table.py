"""SUPPORT.md: the model families, and what is tested in each.

    python tests/support_table.py RESULTS.xml...    write the page from test results
    python tests/support_table.py                   write it again, with the results it has and the registry of today

Results are JUnit files that `pytest --junitxml=RESULTS.xml` writes. A method stands in a cell if tests with the marker
`check` show it and all of them passed.
"""

import pathlib
import sys
import xml.etree.ElementTree
from collections.abc import Collection

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "dit_accel" / "pipelines" / "SUPPORT.md"
COLUMNS = {
    "exact": "the transformer equals itself run with PyTorch's attention under the same token mask",
    "dense is bit-identical": "dense steps and layers run the model's own code beside sparse calls, bit for bit",
    "removable": "after `remove`, processors, hooks, weights and outputs are as they were",
    "compile": "`torch.compile` makes one graph without breaks, of the model or of each block",
    "LoRA": "PEFT adapters work when loaded before and after, fused and unfused",
    "offload": "weights leave the device between calls, module by module and in groups",
    "cache": "Diffusers' caches skip blocks, and the report counts what ran",
    "CFG": "guided samples in one batch equal those computed in turn, with texts of different length",
    "context parallel": "processes that share one sequence (Ulysses) equal one process; static methods run "
    "in a ring too; `parallelize` refuses classes "
    "of which neither their family nor Diffusers says which tensors hold tokens",
    "step caches": "these caches (`cache=`) skip blocks, and a skipped call with the same input has the same answer",
}
STEP_CACHES = "step caches"  # the column whose cells name caches, and no methods
ALL = "✓"
TESTED = "## What is tested together"

Cell = tuple[str, str, str]  # family, method or step cache, and column


def checks_of(item):
    """Yields family, method or step cache, and column of each marker `check` of a test."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for marker in item.iter_markers("check"):
        family = marker.kwargs["family"] if "family" in marker.kwargs else parameters["tiny"].family
        kind = "cache" if marker.args[0] == STEP_CACHES else "method"
        yield family, marker.kwargs[kind] if kind in marker.kwargs else parameters[kind], marker.args[0]


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


def write_page(passed: Collection[Cell], declared: Collection[Cell]) -> str:
    """Returns SUPPORT.md: a table of the registry's families and one of the cells whose tests passed."""
    return "\n".join(
        [
            "# Model families",
            "",
            "`make support` writes this page from test results and the registry. Nobody edits it.",
            "",
            "A preset is a published setting, which `--preset` applies. `dit-accel ls NAME` shows the presets",
            "of a family, or says why a transformer is refused.",
            "",
            *families(),
            "",
            TESTED,
            "",
            "The tests run small random models of the real classes. In each test the report shows sparse calls,",
            "partial blocks and a density under 0.9. The second column names the methods that the family's",
            f"tests use. {ALL} means that all of them passed; otherwise a cell names those that did. An empty",
            "cell was not tested, or Diffusers' class cannot do it.",
            "",
            *(f"- **{column}**: {meaning}" for column, meaning in COLUMNS.items()),
            "",
            *tested(passed, declared),
            "",
        ]
    )


def families() -> list[str]:
    """The table of the registry's families."""
    import test_sizes

    from dit_accel.registry import family_of, get_families

    videos = set()
    for name, transformer, vae, *_ in test_sizes.CASES:
        family = family_of([name])
        if family.sizes(transformer, vae).video:
            videos.add(family.name)
    lines = ["| family | models | makes | presets |", "|---|---|---|---|"]
    for name, family in get_families().items():
        makes = "video" if name in videos else "image"
        lines.append(f"| {name} | {family.summary} | {makes} | {', '.join(sorted(family.recommended))} |")
    return lines


def tested(passed: Collection[Cell], declared: Collection[Cell]) -> list[str]:
    """The table of what passed: a row for each family."""
    lines = ["| family | methods | " + " | ".join(COLUMNS) + " |", "|---|---|" + ":-:|" * len(COLUMNS)]
    for family in sorted({family for family, _, _ in declared}):
        methods = sorted({method for other, method, column in declared if other == family and column != STEP_CACHES})
        cells = []
        for column in COLUMNS:
            names = sorted(name for other, name, in_column in passed if (other, in_column) == (family, column))
            cells.append(ALL if names == methods else ", ".join(names))
        lines.append(f"| {family} | {', '.join(methods)} | " + " | ".join(cells) + " |")
    return lines


def read_table(text: str) -> set[Cell]:
    """Reads back the cells whose tests passed."""
    cells: set[Cell] = set()
    lines = text.partition(f"{TESTED}\n")[2].splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]  # below the header and its rule
    for line in rows:
        family, methods, *row = [part.strip() for part in line.removeprefix("|").removesuffix("|").split("|")]
        for column, cell in zip(COLUMNS, row, strict=True):
            passed = methods if cell == ALL else cell
            cells |= {(family, method, column) for method in passed.split(", ") if method}
    return cells


if __name__ == "__main__":
    sys.path += [str(ROOT), str(ROOT / "tests" / "pipelines")]
    if len(sys.argv) > 1:
        results = read_results(sys.argv[1:])
        page = write_page({cell for cell, good in results.items() if good}, results)
    else:
        cells = read_table(TABLE.read_text(encoding="utf-8"))
        page = write_page(cells, cells)
    TABLE.write_text(page, encoding="utf-8")
