"""Write the kernels as a package for Hugging Face's `kernels`: python -m tools.kernel_package OUT.

The folder holds one build per back end, as `kernels.get_local_kernel` and the Hub expect them::

    OUT/README.md, OUT/LICENSE
    OUT/build/torch-cpu/   metadata.json, __init__.py, errors.py, order.py, tokens.py, kernels/
    OUT/build/torch-cuda/  the same

Its code is that of `dit_accel/kernels` and of the three modules below it. Imports become relative, and the custom ops
get a namespace of their own, so that several versions and dit_accel itself live in one process. It imports torch, and
Triton where a Triton kernel runs.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import pathlib
import re
import shutil

import dit_accel
from dit_accel.errors import DitAccelError

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dit_accel"
NAME, VERSION = "dit-accel-kernels", 1  # of the Hub; a change that breaks callers takes the next number
BACKENDS = ("cpu", "cuda")
BELOW = ("errors.py", "order.py", "tokens.py")
OPS = re.compile(r'(?<=custom_op\(")dit_accel(?=::)')

# What the package offers: the public names, by the module that defines them.
OFFERED = {
    "errors": ("DitAccelError", "DitAccelWarning"),
    "kernels.block_sparse.api": ("attend_blocks", "attend_visual", "pack"),
    "kernels.block_sparse.geometry": ("BlockLists", "Geometry", "Segments"),
    "kernels.impls": ("names",),
    "kernels.router.api": ("route",),
    "kernels.router.rule": ("Rule",),
    "kernels.sla.api": ("sparse_linear_attention",),
    "kernels.sla.arguments": ("SlaArguments",),
    "order": ("TokenOrder",),
    "tokens": ("TokenGrid",),
}
DOCSTRING = """Block-sparse attention and sparse-linear attention, forward and backward, in PyTorch and Triton.

Generated from dit_accel {version} by tools/kernel_package.py. `attend_blocks` attends to listed blocks of keys,
`sparse_linear_attention` computes SLA (arXiv 2509.24006), `route` lists blocks by content. `impl="auto"` takes the
fastest implementation of the machine; `names("block_sparse")` and `names("sla")` are the others.
"""
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, attention, sparse-attention]
---

# {name}

Block-sparse attention and sparse-linear attention (SLA), forward and backward. Triton kernels run on CUDA, plain
PyTorch runs everywhere. Generated from dit_accel {version} by `python -m tools.kernel_package`.

```python
import torch
from kernels import get_kernel  # or get_local_kernel(pathlib.Path("this folder"))

sparse = get_kernel("OWNER/{name}", version={hub})
order = sparse.TokenOrder(sparse.TokenGrid(frames=4, height=16, width=16), block=64)
q = k = v = torch.randn(1, 8, 1024, 64)
lists = sparse.route(q, k, order, order, sparse.Rule(topk=4))  # the best 4 of 16 key blocks
out, lse = sparse.attend_blocks(q, k, v, lists, sparse.Geometry.of(order, order))

call = sparse.SlaArguments(torch.zeros(64, 64), None, order, order, topk=4, scale=64**-0.5)
out, critical = sparse.sparse_linear_attention(q, k, v, call)
```
"""


def relative(source: str, depth: int) -> str:
    """A module's source with its imports of dit_accel made relative.

    Args:
        source: Python code, whose imports of dit_accel are all `from dit_accel… import …`.
        depth: folders between the module and the package's root.

    Raises:
        DitAccelError: it imports dit_accel in another way.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "dit_accel" for alias in node.names):
            raise DitAccelError(f"A packaged module says {ast.unparse(node)!r}. Write `from dit_accel… import …`.")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dit_accel":
            at = node.lineno - 1
            lines[at] = re.sub(r"\bfrom dit_accel\.?", "from " + "." * (depth + 1), lines[at], count=1)
    return "".join(lines)


def modules() -> dict[str, str]:
    """The generated modules, by their path in the package; custom ops still have dit_accel's namespace."""
    paths = [*sorted((PACKAGE / "kernels").rglob("*.py")), *(PACKAGE / name for name in BELOW)]
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    written = {name: relative(source, name.count("/")) for name, source in sources.items()}
    imports = [f"from .{module} import {', '.join(names)}" for module, names in OFFERED.items()]
    offered = json.dumps(sorted(name for names in OFFERED.values() for name in names), indent=4)
    start = f'"""{DOCSTRING.format(version=dit_accel.__version__)}"""'
    return {"__init__.py": "\n\n".join([start, "\n".join(imports), f"__all__ = {offered}\n"]), **written}


def write_package(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write the package.

    Args:
        folder: where to; it must not exist, or be empty.

    Returns:
        The folders of its builds, one per back end.

    Raises:
        DitAccelError: the folder holds something, or a module cannot be packaged.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DitAccelError(f"{folder} holds something already. Name a new or empty folder.")
    sources, builds = modules(), []
    digest = hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:12]
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        identity = f"_{NAME.replace('-', '_')}_{backend}_{digest}"  # the module's name and the namespace of its ops
        for name, source in sources.items():
            path = build / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(OPS.sub(identity, source), encoding="utf-8")
        metadata = {
            "id": identity,
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        builds.append(build)
    card = CARD.format(name=NAME, version=dit_accel.__version__, hub=VERSION)
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    return builds


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_package", description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=pathlib.Path, help="the folder to write; new or empty")
    try:
        builds = write_package(parser.parse_args().out)
    except DitAccelError as error:
        parser.error(str(error))
    print("\n".join(map(str, builds)))


if __name__ == "__main__":
    main()
