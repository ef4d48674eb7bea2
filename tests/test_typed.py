"""Type checkers accept a user's file that calls every public function."""

import ast
import subprocess
import sys

import pytest

import dit_accel
from dit_accel.hooks.report import Report

# Of a plan the documents show these; its other methods are for kernels and methods.
PLAN = {"pairs", "density", "token_mask", "block_mask", "image", "route", "implementation"}


def public(kind):
    """Methods and properties that a class declares itself."""
    return {name for name, value in vars(kind).items() if not name.startswith("_") and not isinstance(value, type)} - {
        *getattr(kind, "__annotations__", ())
    }


def test_a_users_file_calls_every_public_function(root):
    tree = ast.parse((root / "tests" / "typed_user.py").read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    wanted = {*dit_accel.__all__, *public(dit_accel.Accelerator), *public(Report), *public(dit_accel.Setting), *PLAN}
    assert {"remove", "as_dict", "parse", "text", "sparse_calls"} <= wanted  # the guard itself
    assert wanted <= used


def test_mypy_accepts_the_users_file(root, tmp_path):
    """With the cache that `make check` fills, and the flags that a strict user sets for that file alone."""
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import dit_accel\n\ndit_accel.accelerate(None, dense_layers=1.5j)\n")
    command = [sys.executable, "-m", "mypy", "tests/typed_user.py", wrong]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    # the guard itself; mypy keeps the folder of an earlier run in its cache
    assert "wrong.py:3: " in errors[0] and "dense_layers" in errors[0]
