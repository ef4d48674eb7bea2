"""Calls of the Gluon kernels for their tests: problems, and a launch under the emulator where no GPU runs them."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys

import emulator
import pytest
import torch

from dit_accel.kernels.block_sparse.geometry import Predicate
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

SMALL = {"block_q": 128, "block_k": 64, "dim": 64, "heads": 1}
WIDE = {"block_q": 128, "block_k": 128, "dim": 128, "heads": 1}
FRAMES = {"tile_q": (2, 8, 8), "tile_k": (1, 8, 8)}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and not INTERPRETED
SOMEWHERE = pytest.mark.skipif(
    not INTERPRETED and not NATIVE, reason="needs TRITON_INTERPRET=1 or a GPU of compute capability 9.0"
)
_RESULTS = {}


class Emulated:
    """A kernel that is launched as a jitted one is, under the emulator."""

    def __init__(self, kernel, **options):
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid):
        return functools.partial(emulator.launch, self.kernel, grid, **self.options)


def write_words(words, lists, tables, keys, queries, **constants):
    """What `partial_words_kernel` writes (test_triton.py holds it bit by bit), faster than interpreted."""
    grid, query_grid = (tuple(side[:3]) for side in (keys, queries))
    orders = []
    for name, size in (("Q", query_grid), ("K", grid)):
        tile = constants[f"TILE_{name}"]
        orders.append(TokenOrder(TokenGrid(*size), constants[f"BLOCK_{name}"], tile if all(tile) else None))
    slots_q, slots_k = (order.index().view(-1, order.block) for order in orders)
    predicate = Predicate(tables, query_grid, grid)
    bit = 1 << torch.arange(64)
    for row, (pure, _, tabled, _, first) in enumerate(lists.spans.tolist()):
        for i in range(pure, tabled):
            q, k = slots_q[row % queries.blocks], slots_k[lists.places[row, i]]
            seen = predicate.allowed(q.clamp(min=0)[None], k.clamp(min=0)[None])[0] & (k >= 0)
            words[first + i - pure] = (seen.unflatten(1, (-1, 64)) * bit).sum(-1).T


def rounded(problem, dtype):
    """A block-sparse problem of this folder's tests in another dtype."""
    tensors = {name: getattr(problem, name).to(dtype) for name in ("q", "k", "v", "grad_out", "grad_lse")}
    return dataclasses.replace(problem, **tensors)


def forward(problem, impl="gluon", dtype=None):
    """Output and LSE of a block-sparse problem, on the CPU; the LSE is 0 in rows without keys."""
    here = problem.to("cuda") if NATIVE and impl == "gluon" else problem
    out, lse = here.call(impl, dtype, return_lse=True)
    return {"out": out.cpu(), "lse": lse.masked_fill(lse == float("-inf"), 0.0).cpu()}


def forward_once(name, problem):
    """`forward` of the kernel that a test starts with, computed once for all tests of the problem of this name."""
    if name not in _RESULTS:
        _RESULTS[name] = forward(problem)
    return _RESULTS[name]


@contextlib.contextmanager
def changed(tmp_path, modules, kernel, *changes):
    """A kernel from the sources of modules with texts replaced; each module may import from those before it."""
    texts = [pathlib.Path(module.__file__).read_text() for module in modules]
    for old, new in changes:
        assert sum(text.count(old) for text in texts) == 1, old
        texts = [text.replace(old, new) for text in texts]
    names = {module.__name__: f"changed_{module.__name__.rpartition('.')[2]}" for module in modules}
    for module, text in zip(modules, texts, strict=True):
        for name, other in names.items():
            text = text.replace(f"from {name} import", f"from {other} import")
        path = tmp_path / f"{names[module.__name__]}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        loaded = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    yield getattr(loaded, kernel)
    for name in names.values():
        del sys.modules[name]
