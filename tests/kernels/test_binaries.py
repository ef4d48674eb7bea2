"""A new length makes no new binary: what Triton's JIT cache would hold, and on a GPU what it holds."""

import collections
import os
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from block_sparse_calls import block_sparse_attention
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse import geometry, triton_places
from dit_accel.kernels.block_sparse import triton as block_sparse
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.jit import GluonKernel, TritonKernel, any_integer, kernel
from dit_accel.kernels.sla import triton as sla
from dit_accel.kernels.sla import triton_configs as configs
from dit_accel.kernels.sla.arguments import LINEAR_SCOPES
from tools.kernels.ahead_of_time import all_builds

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces what would be compiled"
)
LENGTHS = (1, 2, 15, 16, 63, 64, 65, 1000)
DIM, BLOCK = 64, 64


class Binaries:
    """Counts what the JIT cache tells launches apart by, in place of launching."""

    def __init__(self):
        self.keys = collections.defaultdict(set)
        self.backend = make_backend(GPUTarget("cuda", 90, 32))

    def launch(self, kernel, arguments, constants):
        binder = any_integer(kernel, create_function_from_signature(kernel.signature, kernel.params, self.backend))
        _, specialization, options = binder(*arguments, **constants)
        self.keys[kernel.fn.__name__].add((str(specialization), str(options)))

    def standing_in(self, kernel):
        """What a kernel looks like to a launcher."""
        recorder = self

        class Kernel:
            arg_names = kernel.arg_names

            def __getitem__(self, programs):
                return lambda *arguments, **constants: recorder.launch(kernel, arguments, constants)

        return Kernel()


@pytest.fixture
def binaries(monkeypatch):
    compiled = Binaries()

    def run(kernel, programs, arguments, constants, itemsize):
        compiled.launch(block_sparse.JIT[kernel], arguments, {**constants, "STEP": 32, "num_warps": 4})

    def run_sla(kernel, programs, arguments, constants):
        kernel = sla.JIT[kernel]
        step = {"STEP": 32} if "STEP" in kernel.arg_names else {}
        compiled.launch(kernel, arguments, {**constants, **step, "num_warps": 4})

    monkeypatch.setattr(block_sparse, "INTERPRETED", True)  # no device is asked for
    monkeypatch.setattr(block_sparse, "run", run)
    monkeypatch.setattr(block_sparse, "partial_words_kernel", compiled.standing_in(block_sparse.partial_words_kernel))
    monkeypatch.setattr(triton_places, "place_lists_kernel", compiled.standing_in(triton_places.place_lists_kernel))
    monkeypatch.setattr(sla, "_run", run_sla)
    return compiled


def tensors(tokens, heads=2, device="cpu"):
    """q, k, v and a gradient as a model hands them over."""
    return [torch.randn(1, tokens, heads, DIM, dtype=torch.float16, device=device).transpose(1, 2) for _ in range(4)]


def dense_lists(tokens, device="cpu"):
    blocks = -(-tokens // BLOCK)
    lists = torch.arange(blocks, dtype=torch.int32, device=device).expand(blocks, -1).contiguous()
    return lists, torch.full((blocks,), blocks, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("text", "tables"), [(0, None), (5, None), (5, torch.zeros(1, dtype=torch.int32))])
def test_block_sparse_kernels_are_compiled_once(binaries, text, tables):
    for tokens in LENGTHS:
        q, k, v, grad = tensors(tokens + text)
        lists, counts = dense_lists(tokens)
        blocks = lists.shape[-1] + (text > 0)
        lists = torch.nn.functional.pad(lists, (0, blocks - len(lists), 0, blocks - len(lists)))
        counts = torch.nn.functional.pad(counts, (0, blocks - len(counts)))
        sizes = geometry.Geometry((1, 1, tokens), (1, 1, tokens), BLOCK, BLOCK, None, None, 0, text, own_queries=False)
        block_lists = geometry.BlockLists(lists, counts, tables=tables)
        call = BlockSparseInputs(q, k, v, block_lists, geometry.Segments(), sizes, 0.125)
        out, lse = block_sparse.forward(call)
        block_sparse.backward(grad, lse, out, lse, call)
    assert {name: len(keys) for name, keys in binaries.keys.items()} == {
        "block_sparse_fwd_kernel": 1,
        "block_sparse_bwd_kernel_dq": 1,
        "block_sparse_bwd_kernel_dkdv": 1,
    } | {"place_lists_kernel" if tables is None else "partial_words_kernel": 1}


def test_sla_kernels_are_compiled_once(binaries):
    weight, bias, text_len = torch.zeros(DIM, DIM), torch.zeros(DIM), torch.zeros(1, dtype=torch.int32)
    for tokens in (t for t in LENGTHS if t > 2 * BLOCK or t == BLOCK):
        q, k, v, grad = tensors(tokens)
        sizes = geometry.Geometry((1, 1, tokens), (1, 1, tokens), BLOCK, BLOCK, None, None, 0, 0, own_queries=True)
        lists = (torch.zeros(1, 2, sizes.key_order.blocks, 1, dtype=torch.int32) for _ in range(2))
        *whole, _ = sla.state(k, v, sizes.key_order, "softmax")
        inputs = *whole, *lists, weight, text_len
        for scope in LINEAR_SCOPES:
            call = sla.FusedArguments(sizes, 0.125, "softmax", scope, *inputs)
            for training in (False, True):
                _, *saved = sla.forward(q, k, v, bias, call, training)
            saved[-1].zero_()  # modes, which are read
            sla.backward(grad, q, k, v, saved, call)
    assert len(binaries.keys) == len(sla.JIT) + 1
    for name, keys in binaries.keys.items():
        assert len(keys) == (len(LINEAR_SCOPES) if name.startswith("sparse_linear") else 1), name


BUILDS = {build.kernel: build for build in all_builds(90)}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_no_kernel_has_a_binary_for_an_integer(build):
    """Also for members of records, which ``do_not_specialize`` does not reach."""
    jitted = build.load()
    assert isinstance(jitted, TritonKernel | GluonKernel)
    assert len(jitted.params) <= 25


class Record(NamedTuple):
    pointer: Any
    count: Any
    nested: Any


@kernel
def records_kernel(x, count, record, SIZE: tl.constexpr):
    tl.store(x, tl.load(record.pointer + record.count) + count + record.nested[0])


def test_integers_of_records_are_any_and_pointers_are_aligned():
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = any_integer(
        records_kernel, create_function_from_signature(records_kernel.signature, records_kernel.params, backend)
    )
    x = torch.zeros(64)
    assert x.data_ptr() % 16 == 0

    def key(count, pointer=x):
        return bind(x, count, Record(pointer, count, (count, 0.5)), SIZE=16)[1]

    assert key(1) == key(16) == key(7)
    assert key(7) != key(2**31)
    assert key(7) != key(7, x[1:])
    _, _, (types, keys), size = key(1)
    assert types == Record("*fp32", "i32", ("i32", "fp32"))
    assert keys == Record("D", None, (None, None))
    assert size == ("constexpr", 16)


def test_tuning_knows_no_length():
    """The tuner's key: block sizes, head dimension and tables, to which Triton adds the tensors' dtypes."""
    for jitted in block_sparse.JIT.values():
        keys = set(tuning.tuned(jitted, (Launch(8, 2, 64),), block_sparse.TUNED_BY).keys)
        assert keys == {"BLOCK_Q", "BLOCK_K", "BLOCK_D", "HAS_TABLES"}


def test_tuning_of_sla_knows_no_length():
    """What is tuned apart are constants that no length or tile is part of; what is tried is the table's."""
    candidates = Launch(8, 2, 64), Launch(4, 2, 32)
    for name, jitted in sla.JIT.items():
        tuner = tuning.tuned(jitted, candidates, configs.TUNED_BY)
        constants = {jitted.params[i].name for i in jitted.constexprs}
        assert set(tuner.keys) <= constants - {"ALIGN", "SPLIT", "TILE"}
        assert set(tuner.keys) & {"BLOCK_D", "WIDTH"}
        assert tuner.cache_results
        steps = [{"STEP": c.step} if name != "means" else {} for c in candidates]
        assert [(c.kwargs, c.num_warps, c.num_stages) for c in tuner.configs] == [
            (step, c.warps, c.stages) for step, c in zip(steps, candidates, strict=True)
        ]
        assert tuning.tuned(jitted, candidates, configs.TUNED_BY) is tuner


@pytest.mark.gpu
def test_the_cache_of_a_device_does_not_grow():
    def count():
        return sum(len(kernel.device_caches[0][0]) for kernel in block_sparse.JIT.values())

    held = []
    for tokens in LENGTHS:
        q, k, v, grad = (x.requires_grad_() for x in tensors(tokens, device="cuda"))
        lists = dense_lists(tokens, "cuda")
        out = block_sparse_attention(q, k, v, *lists, block_q=BLOCK, block_k=BLOCK, grid=(1, 1, tokens))
        torch.autograd.grad(out, (q, k, v), grad)
        held.append(count())
    assert held == held[:1] * len(LENGTHS)
