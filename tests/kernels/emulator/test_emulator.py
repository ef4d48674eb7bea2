"""The emulator itself: a small pipeline runs right in every order of events, and each fault seeded in it is found."""

import pytest
import torch

gluon = pytest.importorskip("triton.experimental.gluon")
hopper = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
emulator = pytest.importorskip("emulator")
TensorDescriptor = gluon.nvidia.hopper.TensorDescriptor
gl = gluon.language
mbarrier, tma = hopper.mbarrier, hopper.tma
fence_async_shared, warpgroup_mma, warpgroup_mma_wait = (
    hopper.fence_async_shared,
    hopper.warpgroup_mma,
    hopper.warpgroup_mma_wait,
)
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
ROWS, STAGES = 16, 2


@gluon.jit
def produce(x, count, x_s, full, empty, phase_error: gl.constexpr, STAGES: gl.constexpr):
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ (1 - phase_error))
        mbarrier.expect(full.index(stage), x.block_type.nbytes)
        copy_in(x, [i * x.block_type.shape[0], 0], full.index(stage), x_s.index(stage))


@gluon.jit
def consume(out, count, x_s, out_s, full, empty, fault: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr):
    acc = gl.zeros([ROWS, ROWS], gl.float32)
    for i in range(count):
        stage = i % STAGES
        if fault != "late wait":
            mbarrier.wait(full.index(stage), i // STAGES & 1)
        tile = x_s.index(stage)
        product = warpgroup_mma(tile, tile.permute((1, 0)), acc, is_async=True)
        if fault == "early release":
            mbarrier.arrive(empty.index(stage), count=1)
        if fault == "early use":
            acc = acc + product
        acc = warpgroup_mma_wait(1 if fault == "shallow wait" else 0, deps=(product,))
        if fault == "late wait":
            mbarrier.wait(full.index(stage), i // STAGES & 1)
        if fault != "early release":
            mbarrier.arrive(empty.index(stage), count=2 if fault == "two arrivals" else 1)
    out_s.store(acc.to(out_s.dtype))
    if fault != "no fence":
        fence_async_shared()
    copy_out(out, [0, 0], out_s)
    if fault != "no store wait":
        tma.store_wait(0)


@gluon.jit
def squares_kernel(
    x, out, count, fault: gl.constexpr, phase_error: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr
):
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, ROWS], x.layout)
    out_s = gl.allocate_shared_memory(out.dtype, [ROWS, ROWS], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (out, count, x_s, out_s, full, empty, fault, ROWS, STAGES)),
            (produce, (x, count, x_s, full, empty, phase_error, STAGES)),
        ],
        [1],
        [24],
    )


def describe(x):
    layout = gl.NVMMASharedLayout(32, 8 * x.element_size(), rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [ROWS, ROWS], layout)


def squares(fault="", phase_error=0, order="random", seed=0, tiles=5):
    """Sum of x_i x_i^T over the tiles x_i of a tensor that ends within the last one: what the kernel makes, and so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tiles * ROWS - 3, ROWS, generator=generator, dtype=torch.float16)
    out = torch.full((ROWS, ROWS), float("nan"), dtype=torch.float16)
    emulator.launch(
        squares_kernel, (1,), describe(x), describe(out), tiles,
        fault=fault, phase_error=phase_error, ROWS=ROWS, STAGES=STAGES, order=order, seed=seed,
    )  # fmt: skip
    padded = torch.cat([x, x.new_zeros(3, ROWS)]).float().view(tiles, ROWS, ROWS)
    return out, (padded @ padded.transpose(1, 2)).sum(0).half()


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_right_pipeline_is_right_in_every_order(order, seed):
    out, want = squares(order=order, seed=seed)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_a_wrong_phase_is_a_deadlock_that_names_who_waits(order):
    with pytest.raises(
        emulator.Deadlock, match=r"consume\[0\] at .*mbarrier.wait\(full.*produce\[1\] at .*wait\(empty"
    ):
        squares(phase_error=1, order=order)


def test_an_early_release_shows_nan():
    """In some order of events: the copy that follows must be issued before the product is waited for."""
    assert any(squares("early release", order="lazy", seed=seed)[0].isnan().any() for seed in range(8))


def test_a_late_wait_for_a_copy_shows_nan():
    out, _ = squares("late wait", order="lazy")
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("early use", "used before warpgroup_mma_wait"),
        ("shallow wait", "leaves in flight"),
        ("two arrivals", "a barrier of 1 arrivals a phase got more"),
        ("no fence", r"written by consume\[0\] is read by an engine without fence_async_shared"),
        ("no store wait", "ends with work in flight"),
    ],
)
def test_what_a_gpu_does_not_forgive_is_an_error(fault, words):
    with pytest.raises(emulator.KernelError, match=words):
        squares(fault)


@gluon.jit
def leave(x, x_s, bar):
    mbarrier.expect(bar, 512)
    copy_in(x, [0, 0], bar, x_s)


@gluon.jit
def leaving_kernel(x, ROWS: gl.constexpr):
    x_s = gl.allocate_shared_memory(x.dtype, [ROWS, ROWS], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    gl.warp_specialize([(leave, (x, x_s, bars.index(0)))], [], [])


def test_a_copy_that_nobody_waits_for_is_an_error():
    x = torch.zeros(ROWS, ROWS, dtype=torch.float16)
    with pytest.raises(emulator.KernelError, match="a copy into its shared memory is in flight"):
        emulator.launch(leaving_kernel, (1,), describe(x), ROWS=ROWS, order="lazy")


def test_the_same_seed_is_the_same_run():
    """Which partition goes on when, as the lines that it stops at."""

    def trace(seed):
        machine, lines = emulator.Machine(seed), []

        def body(name):
            def run():
                for _ in range(20):
                    lines.append(name)
                    machine.pause()

            return run

        machine.run([(name, body(name)) for name in "abc"])
        return lines

    assert trace(0) == trace(0)
    assert trace(0) != trace(1)


@gluon.jit
def numbers_kernel(x, out, number):
    before = number
    number += 1
    gl.store(out + gl.arange(0, 2), gl.where(gl.arange(0, 2) == 0, before, number))
    places = gl.arange(0, 8)
    gl.store(out + 2 + places, gl.load(x + places, mask=places < 3, other=-7))


@gluon.jit
def leaping_kernel(x, out):
    gl.store(out, gl.load(x + 3))


def test_pointers_and_numbers_are_a_gpu_s():
    """Numbers overflow at 32 bits, += makes a new value, masked elements are not read, others must exist."""
    x, out = torch.arange(3, dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    emulator.launch(numbers_kernel, (1,), x, out, 2**31 - 1)
    assert out.tolist() == [2**31 - 1, -(2**31), 0, 1, 2, -7, -7, -7, -7, -7]
    with pytest.raises(emulator.KernelError, match="outside a tensor of 3 elements"):
        emulator.launch(leaping_kernel, (1,), x, out)


@pytest.mark.parametrize(
    ("strides", "words"),
    [([20, 1], "multiples of 16 bytes"), ([16, 2], "multiples of 16 bytes"), ([1 << 40, 1], "below 2")],
)
def test_descriptors_that_the_engine_refuses(strides, words):
    x = torch.zeros(64, 16, dtype=torch.float16)
    with pytest.raises(emulator.KernelError, match=words):
        emulator.Descriptor(x, [64, 16], strides, [16, 16])


def test_addresses_wrap_and_stay_within_the_tensor():
    x = torch.arange(64.0, dtype=torch.float16).view(8, 8).contiguous()
    run = emulator.Descriptor(x, [1 << 31, 1 << 31, 1 << 30, 8], [(1 << 34) - 8, 8, 8, 1], [1, 1, 4, 8])
    # rows 2 to 4 are a run of 3: a box from its row 1 on has two of them
    box = run.read([1 << 30, 2 + 3, (1 << 30) - 3 + 1, 0])
    assert torch.equal(box[0, 0], torch.cat([x[3:5], torch.zeros(2, 8, dtype=x.dtype)]))
    with pytest.raises(emulator.KernelError, match="leaves the tensor"):
        emulator.Descriptor(x, [9, 8], [8, 1], [16, 8]).read([0, 0])
