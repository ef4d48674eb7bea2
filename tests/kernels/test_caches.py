"""No cache keeps a device tensor that a traced call made: it may lie in the memory of a CUDA graph."""

import ast
import pathlib

import pytest
import torch

import dit_accel
from dit_accel.tokens import TokenGrid

PACKAGE = pathlib.Path(dit_accel.__file__).parent
CACHES = {"cache", "lru_cache"}


def caching(decorator):
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return getattr(call, "attr", getattr(call, "id", None)) in CACHES


def cached_on_devices(source):
    """Cached functions with a device among their arguments, and what they return."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(map(caching, node.decorator_list)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any("device" in f"{x.arg} {ast.unparse(x.annotation or ast.Constant(0))}" for x in arguments):
                yield node.name, ast.unparse(node.returns) if node.returns else ""


def test_cached_functions_of_a_device_return_no_tensors():
    cached = {
        f"{path.relative_to(PACKAGE)}:{name}": returns
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, returns in cached_on_devices(path.read_text(encoding="utf-8"))
    }
    assert cached == {"kernels/block_sparse/triton.py:_candidates": "tuple[Launch, ...]"}


def test_a_cached_tensor_is_found():
    source = "@functools.lru_cache(maxsize=16)\ndef _sizes(order, device: torch.device) -> Tensor: ..."
    assert list(cached_on_devices(source)) == [("_sizes", "Tensor")]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sol", {"order": "morton", "block": 32, "block_q": 32}),
        ("rectified", {}),
        ("sparge", {"budgets": (0.5, 0.3)}),
        ("sparge", {}),
        ("sla", {}),
        ("proxy", {}),
        ("agent", {}),
    ],
)
def test_a_plan_makes_what_it_keeps_before_its_calls(method, settings):
    plan = dit_accel.plan(method, TokenGrid(2, 12, 16, text=5), **settings)
    q, k, v = torch.randn(3, 1, 2, plan.grid.tokens, 16).unbind(0)
    plan.prepare(q.device, q.dtype, 16)
    built = set(plan.built)
    plan.attend(q, k, v, density_sum=torch.zeros(2))
    assert set(plan.built) == built
