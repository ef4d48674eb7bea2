"""What is compiled again, and what is taken from the record of earlier runs."""

import importlib.util
import json

import pytest
from triton.compiler import ASTSource

from tools.kernels import ahead_of_time
from tools.kernels.record import Record, key_of

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def scaled(x):
    return x * {factor}

@triton.jit
def kernel(x, N: tl.constexpr):
    tl.store(x, scaled(N))
"""


def square(number, power):
    """In another process; `power` tells whether it ran."""
    return {"kernel": f"k{number}", "value": number**power}


def test_what_is_recorded_is_not_compiled_again(tmp_path, capsys):
    path = tmp_path / "builds.jsonl"
    rows = list(Record(path).rows("3.9.0", ["a", "b"], [(1, 2), (3, 2)], square))
    assert [row["value"] for row in rows] == [1, 9] and "2 builds compiled" in capsys.readouterr().err
    rows = list(Record(path).rows("3.9.0", ["a", "c"], [(1, 0), (5, 3)], square))
    assert [row["value"] for row in rows] == [1, 125] and "1 builds compiled" in capsys.readouterr().err
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["key"] for entry in entries} == {"a", "c"}


def test_another_version_keeps_its_rows(tmp_path):
    path = tmp_path / "builds.jsonl"
    for version in ("3.9.0", "3.6.0"):
        list(Record(path).rows(version, [f"a of {version}"], [(2, 2)], square))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["triton"] for entry in entries] == ["3.6.0", "3.9.0"]


def test_without_a_file_all_is_compiled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [row["value"] for row in Record(None).rows("3.9.0", ["a"], [(2, 3)], square)] == [8]
    assert not list(tmp_path.iterdir())


def test_each_build_has_its_own_key():
    jobs = [(build, arch, "bf16") for arch in ahead_of_time.ARCHS for build in ahead_of_time.all_builds(arch)]
    keys = {ahead_of_time.source_of(*job)[2] for job in jobs}
    assert len(keys) == len(jobs)
    build, arch, _ = next(job for job in jobs if job[0].kernel == "block_sparse_forward")
    assert ahead_of_time.source_of(build, arch, "fp16")[2] not in keys


@pytest.fixture
def key(tmp_path):
    def make(factor=2, version="3.9.0", number=1, arch=90, stages=3, reader="a"):
        path = tmp_path / "scaled.py"
        path.write_text(KERNEL.format(factor=factor))
        spec = importlib.util.spec_from_file_location("scaled", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        source = ASTSource(module.kernel, {"x": "*i32", "N": "constexpr"}, constexprs={"N": number})
        return key_of(version, source, {"num_stages": stages}, arch, reader)

    return make


@pytest.mark.parametrize(
    "changed",
    [{"factor": 3}, {"version": "3.6.0"}, {"number": 2}, {"arch": 80}, {"stages": 2}, {"reader": "b"}],
    ids=str,
)
def test_whatever_decides_the_row_changes_the_key(changed, key):
    """The factor stands in a function that the kernel calls."""
    assert key(**changed) != key() == key()
