"""The shape of the checkout: doors, packages, floors, what an import costs, what is packaged."""

import ast
import collections
import graphlib
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import warnings

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dit_accel"
DOORS = ("kernels", "pipelines", "eval")
SOFT_LIMIT, HARD_LIMIT = 400, 500
TOP_LIMIT = 12  # modules of the package's own

# From the bottom up. A module imports from its own floor and from floors below; KEPT_APART lists what may not meet.
FLOORS = (
    ("errors", "files", "tokens", "order"),
    ("kernels",),
    ("plans",),
    ("registry", "values", "schedule"),
    ("method",),
    ("methods",),
    ("pipelines",),
    ("caches",),
    ("setting",),
    ("hooks",),
    ("accelerator", "checkpoint"),
    ("generation",),
    ("train", "eval", "bench"),
    ("tune",),
    ("cli",),
    ("__init__", "__main__"),
)
KEPT_APART = (
    ("pipelines", "methods"),
    *((one, other) for one in ("train", "eval", "bench") for other in ("train", "eval", "bench") if one != other),
)
FLOOR_OF = {part: i for i, parts in enumerate(FLOORS) for part in parts}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def dotted(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part_of(module: str) -> str:
    """The part of the package a module belongs to: dit_accel.kernels.sla.api is in kernels."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: pathlib.Path) -> set[str]:
    """Modules of ours that a file imports, in functions too; for type checkers only does not count."""
    imported: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name, not relatively"
            assert node.module is not None
            for alias in node.names:
                if alias.name == "__version__":
                    continue
                name = f"{node.module}.{alias.name}"
                imported.add(name if (ROOT / name.replace(".", "/")).exists() or is_module(name) else node.module)
        pending += ast.iter_child_nodes(node)
    return {name for name in imported if name == "dit_accel" or name.startswith("dit_accel.")}


def is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).with_suffix(".py").exists()


def test_doors_are_relative_links_to_the_code():
    for door in DOORS:
        assert (ROOT / door).is_symlink()
        assert os.readlink(ROOT / door) == f"dit_accel/{door}"


def test_only_the_three_doors_are_namespace_packages():
    """With the checkout first on sys.path a regular package `kernels` would hide Hugging Face's from Diffusers."""
    folders = {path.parent for path in modules()}
    without = {folder.relative_to(PACKAGE).as_posix() for folder in folders if not (folder / "__init__.py").exists()}
    assert without <= set(DOORS)
    for door in DOORS:
        assert not (PACKAGE / door / "__init__.py").exists()


def test_the_checkout_hides_no_package_of_others(tmp_path):
    other = tmp_path / "site"
    (other / "kernels").mkdir(parents=True)
    (other / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(other)!r}]; import kernels; print(kernels.whose)"
    assert run_python(program, cwd=ROOT) == "theirs"


def test_integrations_import_torch_and_this_package_alone():
    """An add-on is loaded by its host, whose code stays out of this checkout."""
    imported = set()
    for path in (ROOT / "integrations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "dit_accel"}


def scripts() -> set[pathlib.Path]:
    """Modules that are run, and that no module imports: they stand above everything, wherever their file lies."""
    imported = {name for path in modules() for name in imports(path)}
    return {
        path
        for path in modules()
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8") and dotted(path) not in imported
    }


def test_floors_import_only_from_below():
    wrong = []
    for path in set(modules()) - scripts():
        importer = part_of(dotted(path))
        for name in imports(path):
            imported = part_of(name)
            if FLOOR_OF[imported] > FLOOR_OF[importer] or (importer, imported) in KEPT_APART:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    """Imports in functions count, too."""
    names = {dotted(path).removesuffix(".__init__"): path for path in modules()}
    graph = {name: (imports(path) & set(names)) - {name} for name, path in names.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_class_names_are_unique():
    """But for `Config`, which each method has."""
    modules_of = collections.defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                modules_of[node.name].append(dotted(path))
    assert {name: places for name, places in modules_of.items() if len(places) > 1 and name != "Config"} == {}


def test_few_modules_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_LIMIT


def test_only_the_table_of_implementations_compares_their_names():
    from dit_accel.kernels import impls

    known = {row.name for row in impls.ROWS}
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [part for side in (node.left, *node.comparators) for part in getattr(side, "elts", [side])]
                if any(isinstance(side, ast.Constant) and side.value in known for side in sides):
                    wrong.append(f"{dotted(path)}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_every_part_has_a_floor():
    parts = {part_of(dotted(path)) for path in modules()}
    assert parts <= set(FLOOR_OF), f"say on which floor these stand: {sorted(parts - set(FLOOR_OF))}"


def test_imports_reads_functions_and_skips_type_checking(tmp_path):
    """The guard itself: what it must see, and what it must not."""
    file = tmp_path / "sample.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "from dit_accel import plans\n"
        "if TYPE_CHECKING:\n    from dit_accel.cli import app\n"
        "def f():\n    from dit_accel.errors import DitAccelError\n    import dit_accel.accelerator\n"
    )
    assert imports(file) == {"dit_accel.plans", "dit_accel.errors", "dit_accel.accelerator"}


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    for path, lines in lengths.items():
        if lines > SOFT_LIMIT:
            warnings.warn(f"{path} has {lines} lines: is it one thing?", stacklevel=1)
    assert {path: lines for path, lines in lengths.items() if lines > HARD_LIMIT} == {}


def run_python(program: str, cwd: pathlib.Path, **environment: str) -> str:
    """What a fresh Python prints for a program."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("diffusers", "transformers", "triton", "torchmetrics", "imageio", "PIL", "accelerate", "peft")


def test_import_needs_nothing_heavy(tmp_path):
    program = f"import sys, dit_accel; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(program, tmp_path) == "[]"


def test_core_works_without_the_optional_packages(tmp_path):
    """Planning, masks and attention on a machine that has torch and nothing else of these."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"  # None there means: not installed
        "import torch, dit_accel\n"
        "grid = dit_accel.TokenGrid(frames=2, height=4, width=4, text=3)\n"
        "plan = dit_accel.plan('gna', grid, window=2)\n"
        "q = torch.randn(1, 2, grid.tokens, 16)\n"
        "out = dit_accel.attention(q, q, q, plan)\n"
        "print(tuple(out.shape), dit_accel.list_methods())\n"
    )
    assert run_python(program, tmp_path).startswith("(1, 2, 35, 16)")


def test_public_names_resolve():
    import dit_accel

    for name in dit_accel.__all__:
        assert getattr(dit_accel, name) is not None
        assert name in dir(dit_accel)
    with pytest.raises(AttributeError, match="has no attribute 'acelerate'"):
        dit_accel.acelerate  # noqa: B018


@pytest.mark.timing
def test_import_costs_little_more_than_torch(tmp_path):
    def seconds(statement: str) -> float:
        program = f"import time; {statement}; print(time.process_time())"
        return min(float(run_python(program, tmp_path)) for _ in range(3))

    assert seconds("import torch, dit_accel; dit_accel.plan, dit_accel.TokenGrid") < seconds("import torch") + 1


def test_constraints_pin_what_the_project_asks_for():
    """Every direct dependency, optional ones too, has exactly one pinned version, and torch no local build."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {normal(item) for item in requirements} - {"dit-accel"}
    assert names <= {normal(pin) for pin in pins}, names - {normal(pin) for pin in pins}
    assert "+" not in pins["torch"]


def normal(requirement: str) -> str:
    """A requirement's package name as indexes spell it."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return name[0].lower().replace("_", "-")
