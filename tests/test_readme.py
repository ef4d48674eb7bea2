"""What the documents tell people to type exists and is accepted, and figures are those of the rows they link to."""

import ast
import json
import pathlib
import re

import pytest
import typer
from pages import blocks, commands, typed, words

from dit_accel.cli.app import app

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ADDING = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"))
}
PAGES |= {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "dit_accel").rglob("*.md")
}
RESULTS = ROOT / "benchmarks" / "results"


def each_page(pages=tuple(PAGES)):
    return pytest.mark.parametrize("page", pages)


TYPED = [(page, line) for page, text in PAGES.items() for line in typed(text)]


def test_there_are_commands():
    assert {page for page, _ in TYPED} >= {"README.md", "docs/generate.md", "docs/evaluation.md", "docs/fine-tuning.md"}
    verbs = {words(line)[0] for _, line in TYPED}
    assert verbs == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize(("page", "command"), TYPED)
def test_commands_parse(page, command):
    """Options and their values are accepted, the method with its settings too; nothing is run."""
    from dit_accel import registry

    verb, *arguments = words(command)
    group = typer.main.get_command(app)
    context = group.commands[verb].make_context(verb, arguments, resilient_parsing=False)
    methods = context.params.get("method") or ()
    for method in [methods] if isinstance(methods, str) else methods:
        name, settings = registry.parse_method(
            method, context.params.get("settings") or context.params.get("config") or ()
        )
        if not context.params.get("candidates"):  # a layer search takes its settings from the candidates
            registry.make_config(name, settings)


@pytest.mark.parametrize(
    ("page", "block"), [(page, block) for page, text in PAGES.items() for block in blocks(text, "python")]
)
def test_python_parses_and_its_names_exist(page, block):
    """Names of `dit_accel` and what is imported from it exist."""
    import importlib

    import dit_accel

    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dit_accel":
            assert hasattr(dit_accel, node.attr)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dit_accel"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@each_page()
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = PAGES[page]
    typed = "\n".join([*blocks(text, "sh"), *re.findall(r"`[^`\n]+`", text)])
    assert set(re.findall(r"\bmake ([a-z]+)", typed)) <= targets


@each_page()
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        if not target.startswith("http"):
            assert (folder / target).exists(), target


@each_page()
def test_files_that_are_named_exist(page):
    """Paths in backquotes that start at a folder of the checkout."""
    if page == "CHANGELOG.md" or page == "benchmarks/LOG.md":  # these speak of the past too
        return
    for target in re.findall(r"`((?:dit_accel|tests|tools|docs|benchmarks)/[\w./-]*\w/?)`", PAGES[page]):
        assert "NAME" in target or (ROOT / target).exists(), target


def test_the_readme_starts_with_demo_and_test():
    first, second = commands(README)[:2]
    assert first.startswith("make demo") and second.startswith("make test")


def operators(rows: pathlib.Path) -> str:
    """The table of operators in docs/benchmarks.md, from the forward rows."""
    measured: dict[str, list[dict]] = {}
    for row in rows_of(rows):
        if row["direction"] == "forward":
            _, method, *_ = row["row"].split("/")
            config = method if ":" in method else ",".join([method, *_settings(row["config"])]).replace(",", ":", 1)
            measured.setdefault(config, []).append(row)
    lines = ["|method|density|dense, ms|sparse, ms|speed-up|in bf16|", "|---|---:|---:|---:|---:|---:|"]
    for config, (fp32, bf16) in measured.items():
        assert (fp32["dtype"], bf16["dtype"]) == ("float32", "bfloat16")
        figures = f"{fp32['density']:.4f}|{fp32['baseline_ms_p50']:.0f}|{fp32['ms_p50']:.1f}|{fp32['speedup']:.2f}"
        lines.append(f"|`{config}`|{figures}|{bf16['speedup']:.2f}|")
    return "\n".join(lines)


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _settings(config):
    return [f"{name}={value}" for name, value in config.items() if name in ("topk", "decay", "references", "tau")]


def test_the_table_of_operators_is_the_rows():
    page = PAGES["docs/benchmarks.md"]
    table = re.search(r"<!-- operators: begin -->\n(.*?)\n<!-- operators: end -->", page, flags=re.DOTALL)
    rows = re.search(r"\(\.\./(benchmarks/results/cpu-[\w-]+\.jsonl)\)", page)
    assert table is not None and rows is not None
    assert table[1] == operators(ROOT / rows[1])


def test_the_demos_figures_are_those_of_its_record():
    record = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    dense, fast = (record["runs"][name]["seconds"] for name in ("dense", "accelerated"))
    assert f"| dense: {dense:.1f} s | accelerated: {fast:.1f} s, {dense / fast:.2f} times as fast |" in README
    likeness = f"a PSNR of {record['comparison']['psnr']:.1f} dB and an SSIM of {record['comparison']['ssim']:.3f}"
    assert likeness in " ".join(PAGES["docs/results.md"].split())


def test_the_results_of_the_readme_are_measured():
    """Every speed-up and PSNR of the table is a row of benchmarks/results."""
    measured = []
    for name in ("eval_demo_levels", "eval_demo_large", "eval_demo"):
        summary = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for row in summary["rows"]:
            psnr = row["figures"]["psnr"]["value"]
            if row["label"] != "baseline":
                measured.append((row["method"], f"{row['speedup']:.2f}", f"{psnr:.1f} dB"))
    for name in ("steps", "rows"):
        for row in rows_of(RESULTS / "h200" / f"{name}.jsonl"):
            measured.append((row.get("method") or row["op"], f"{row['speedup']:.2f}", ""))
    table = README.partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|[^|]+\|[^|]+\| `(\w+)`[^|]*\| ([\d.]+) \| ([^|]*?) ?\|$", table, flags=re.MULTILINE)
    assert rows and len(rows) == table.count("\n| ") - 1  # the header is not a row
    assert [row for row in rows if row not in measured] == []


def test_the_readme_chooses_as_the_methods_say_and_names_families_that_exist():
    from dit_accel.registry import get_families, get_methods

    choice = README.partition("\n## Which method?\n")[2].partition("\n## ")[0]
    models = README.partition("\n## Which models?\n")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| ([^`|!][^|]*) \|$", choice, flags=re.MULTILINE))
    assert shown == {method.name: method.advice for method in get_methods().values()}
    assert set(re.findall(r"^\| `(\w+)` \|", models, flags=re.MULTILINE)) <= set(get_families())


@pytest.mark.parametrize(
    ("starts", "file"),
    [("def layout", "dit_accel/pipelines/allegro.py"), ("GRID = ", "tests/pipelines/models/allegro.py")],
)
def test_the_family_shown_is_the_one_there_is(starts, file):
    """The example of the page is what the files of that family say, to their ends."""
    shown = next(block for block in blocks(ADDING, "python") if block.startswith(starts))
    assert (ROOT / file).read_text(encoding="utf-8").strip().endswith(shown.strip())


def test_the_floors_shown_are_those_of_the_layout_test():
    from test_layout import FLOORS

    assert "\n".join(" | ".join(floor) for floor in reversed(FLOORS)) in CONTRIBUTING
