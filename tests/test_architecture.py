"""docs/architecture.md lists the files that q passes from the processor to the kernel; real calls pass the same."""

import os
import pathlib
import re
import sys

import pytest
import torch

import dit_accel
from dit_accel.kernels import impls

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dit_accel"
MOST = 10  # files from the processor to the kernel
KERNELS = ("kernels/router/", "kernels/tail/", "kernels/block_sparse/")
METHODS = {"gna": {"window": 3}, "sla": {"topk": 0.3, "block": 16}, "sol": {"block": 16, "block_q": 16}}
ROW = re.compile(r"^\|`(?P<method>\w+)`\|`(?P<impl>\w+)`\|(?P<kernel>\w+)\|(?P<files>.*)\|$", flags=re.MULTILINE)
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SHOWN: dict[tuple[str, str], dict[str, list[str]]] = {}
for _row in ROW.finditer(PAGE):
    _files = re.findall(r"`([\w/]+\.py)`", _row["files"])
    SHOWN.setdefault((_row["method"], _row["impl"]), {})[_row["kernel"]] = _files
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_the_page_shows_static_and_routed_plans():
    assert set(SHOWN) == {
        *(("gna", "portable"), ("gna", "triton"), ("sla", "triton")),
        *(("sol", "portable"), ("sol", "triton")),
    }
    assert max(len(files) for ways in SHOWN.values() for files in ways.values()) <= MOST


def test_the_page_shows_every_implementation():
    rows = re.findall(r"^\| `(\w+)` \| [^|]*\| [^|]*\|$", PAGE, flags=re.MULTILINE)
    assert rows == [name for name in impls.names() if name != impls.AUTO]


def passed(run, monkeypatch) -> list[str]:
    """Files of the package with a function that takes q, or a call that holds it, in the order of their first calls.

    Kernels are not computed: it is enough that they are launched.
    """
    files, inside = [], f"{PACKAGE}{os.sep}"

    def note(code, names, variables=None):
        takes_q = {"q", "query"} & set(names) or ("call" in names and hasattr((variables or {}).get("call"), "q"))
        if takes_q and code.co_filename.startswith(inside):
            files.append(code.co_filename.removeprefix(inside))

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call":
            note(code, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], frame.f_locals)

    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: note(self.fn.__code__, self.arg_names))
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    return list(dict.fromkeys(files))


def ways(files: list[str]) -> dict[str, list[str]]:
    """The files up to the kernel of attention, and up to those of the router and of the tail where there are any."""
    apart = {name: [file for file in files if file.startswith(f"kernels/{name}/")] for name in ("router", "tail")}
    ways = {"attention": [file for file in files if not any(file in kernel for kernel in apart.values())]}
    for name, kernel in apart.items():
        before = [file for file in files[: files.index(kernel[0])] if not file.startswith(KERNELS)] if kernel else []
        ways |= {name: before + kernel} if kernel else {}
    return ways


@pytest.mark.parametrize(("method", "impl"), sorted(SHOWN))
def test_q_passes_the_files_shown(method, impl, tiny_wan, wan_inputs, monkeypatch):
    if impl == "triton" and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1, under which kernels are Python too")
    transformer, inputs = tiny_wan(), wan_inputs(1)
    with dit_accel.accelerated(transformer, method, impl=impl, **METHODS[method]), torch.no_grad():
        transformer(**inputs)  # plans are built, which is not part of the way
        assert ways(passed(lambda: transformer(**inputs), monkeypatch)) == SHOWN[method, impl]
