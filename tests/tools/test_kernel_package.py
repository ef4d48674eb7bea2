"""The package of kernels, loaded in a process that has no dit_accel, computes what dit_accel computes."""

import ast
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import attend_blocks
from dit_accel.kernels.block_sparse.geometry import Geometry
from dit_accel.kernels.router.api import route
from dit_accel.kernels.router.rule import Rule
from dit_accel.kernels.sla.api import sparse_linear_attention
from dit_accel.kernels.sla.arguments import SlaArguments
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid
from tools import kernel_package

GRID = (2, 4, 7)
# Without dit_accel, also where it is installed. `loaded` is the package.
PROGRAM = """
import sys
sys.modules["dit_accel"] = None
folder, loader, tensors, results = sys.argv[1:]
import pathlib, torch
if loader == "kernels":
    import kernels
    loaded = kernels.get_local_kernel(pathlib.Path(folder).parents[1], backend="cpu")
else:
    from importlib import util
    spec = util.spec_from_file_location("alone", folder + "/__init__.py")
    loaded = sys.modules["alone"] = util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
q, k, v, weight, gradient = torch.load(tensors)
q, k, v, weight = (x.requires_grad_() for x in (q, k, v, weight))
order = loaded.TokenOrder(loaded.TokenGrid(2, 4, 7), 16)
found = {}
for impl in ("auto", "triton"):
    lists = loaded.route(q, k, order, order, loaded.Rule(topk=2), impl=impl)
    exact, _ = loaded.attend_blocks(q, k, v, lists, loaded.Geometry.of(order, order), impl=impl)
    grads = torch.autograd.grad(exact, (q, k, v), gradient)
    call = loaded.SlaArguments(weight, None, order, order, topk=2, scale=0.25, impl=impl)
    both, critical = loaded.sparse_linear_attention(q, k, v, call)
    grads += torch.autograd.grad(both, (q, k, v, weight), gradient)
    found[impl] = [exact.detach(), both.detach(), critical, *grads]
torch.save(found, results)
ours = [name for name, module in sys.modules.items() if name.startswith("dit_accel") and module is not None]
assert not ours, ours
"""
MISSING = importlib.util.find_spec("kernels") is None or not hasattr(importlib.import_module("kernels"), "__version__")


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return kernel_package.write_package(tmp_path_factory.mktemp("hub") / "package")


@pytest.fixture(scope="module")
def tensors():
    """q, k, v, the projection's weight and the output's gradient."""
    numbers = torch.Generator().manual_seed(0)
    q, k, v, gradient = torch.randn(4, 1, 2, math.prod(GRID), 16, generator=numbers)
    return [q, k, v, torch.randn(16, 16, generator=numbers) / 4, gradient]


def here(tensors):
    """What dit_accel computes, in the order of the program's results."""
    q, k, v, weight = (x.clone().requires_grad_() for x in tensors[:4])
    order = TokenOrder(TokenGrid(*GRID), 16)
    lists = route(q, k, order, order, Rule(topk=2))
    exact, _ = attend_blocks(q, k, v, lists, Geometry.of(order, order))
    grads = torch.autograd.grad(exact, (q, k, v), tensors[4])
    both, critical = sparse_linear_attention(q, k, v, SlaArguments(weight, None, order, order, topk=2, scale=0.25))
    grads += torch.autograd.grad(both, (q, k, v, weight), tensors[4])
    return [exact.detach(), both.detach(), critical, *grads]


@pytest.mark.parametrize(
    "loader",
    [
        "path",
        pytest.param("kernels", marks=pytest.mark.skipif(MISSING, reason="not installed: pip install kernels")),
    ],
)
def test_it_computes_the_same_without_dit_accel(loader, builds, tensors, tmp_path):
    """The portable code bit for bit; the Triton kernels, under Triton's interpreter, but for the order of sums."""
    torch.save(tensors, tmp_path / "in.pt")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(builds[0]), loader, tmp_path / "in.pt", tmp_path / "out.pt"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs, wanted = torch.load(tmp_path / "out.pt"), here(tensors)
    names = "exact both critical dq dk dv sla_dq sla_dk sla_dv sla_dweight".split()
    for impl, error in (("auto", 0.0), ("triton", 2e-5)):
        for name, got, want in zip(names, outputs[impl], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=error, atol=error, msg=lambda text, name=name: f"{name}: {text}")


def test_it_imports_torch_triton_and_itself_alone(builds):
    """cuDNN's kernels import their package when they run."""
    outside = set()
    for path in builds[0].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                outside |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                outside.add(node.module.partition(".")[0])
    assert outside - set(sys.stdlib_module_names) == {"torch", "triton", "cudnn"}


def test_builds_of_one_process_have_ops_of_their_own(builds):
    """Two back ends, and dit_accel itself, register no op twice."""
    spaces = [{line for line in (build / "kernels/sla/ops.py").read_text().splitlines() if "custom_op(" in line}
              for build in (*builds, pathlib.Path(kernel_package.PACKAGE))]  # fmt: skip
    assert all(spaces) and not set.intersection(*spaces[:2]) and not set.intersection(*spaces[1:])


def test_other_spellings_of_an_import_and_full_folders_are_refused(tmp_path):
    assert kernel_package.relative("from dit_accel import order\n", 2) == "from ... import order\n"
    assert kernel_package.relative("    from dit_accel.a import b\n".strip(), 0) == "from .a import b"
    with pytest.raises(DitAccelError):
        kernel_package.relative("import dit_accel.order\n", 0)
    (tmp_path / "file").touch()
    with pytest.raises(DitAccelError):
        kernel_package.write_package(tmp_path)
