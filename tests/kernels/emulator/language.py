"""What Gluon's functions do, in PyTorch: the part of the language that the project's kernels use.

Scalars are tensors without axes, int32 unless the kernel says otherwise, so that they overflow as on a GPU. Layouts are
ignored. A name that a kernel uses and this file lacks is an AttributeError.
"""

import threading
import types

import torch

from emulator.machine import Barrier, Flight, KernelError

BARRIERS = "barriers"
_here = threading.local()


class Program:
    """What the threads of a program share: its number in each axis of the grid, the grid, and the machine."""

    def __init__(self, ids, grid, machine):
        self.ids, self.grid, self.machine = ids, grid, machine

    def __enter__(self):
        _here.program = self

    def __exit__(self, *_):
        del _here.program


def _machine():
    return _here.program.machine


class Pointer:
    """Elements of a tensor from an offset on."""

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)

    def __sub__(self, offset):
        return Pointer(self.tensor, self.offset - offset)

    def _places(self, mask):
        places = torch.as_tensor(self.offset).long()
        used = places if mask is None else places.masked_fill(~mask, 0)
        if bool((used < 0).any()) or bool((used >= self.tensor.numel()).any()):
            raise KernelError(f"memory outside a tensor of {self.tensor.numel()} elements is addressed")
        return used


class Descriptor:
    """A tensor as the copy engine addresses it: [shape] elements at strides from `base`, in boxes of [block].

    Addresses wrap around 2 ** 64 bytes, as the engine's do.

    Raises:
        KernelError: the engine does not take it (CUDA driver API, cuTensorMapEncodeTiled).
    """

    def __init__(self, base, shape, strides, block):
        size = base.element_size()
        if not 1 <= len(shape) <= 5 or len(shape) != len(strides) or len(shape) != len(block):
            raise KernelError(f"a descriptor has 1 to 5 axes, not {len(shape)}")
        if strides[-1] != 1 or any(s * size % 16 or not 0 <= s * size < 1 << 40 for s in strides[:-1]):
            raise KernelError(f"strides of {size}-byte elements must be multiples of 16 bytes below 2 ** 40: {strides}")
        if base.data_ptr() % 16 or any(not 0 < n <= 1 << 32 for n in shape) or any(not 0 < n <= 256 for n in block):
            raise KernelError(f"base, shape {shape} or box {block} is not what the engine takes")
        self.shape, self.strides, self.block, self.dtype = shape, strides, block, base.dtype
        self.memory = torch.as_strided(base, (base.untyped_storage().nbytes() // size,), (1,), 0)
        self.size, self.first = size, base.storage_offset() * size
        self.block_type = types.SimpleNamespace(shape=list(block), nbytes=torch.Size(block).numel() * size)
        self.layout = None

    def _check(self, coordinates):
        if len(coordinates) != len(self.shape):
            raise KernelError(f"{len(coordinates)} coordinates for a descriptor of {len(self.shape)} axes")

    def _box(self, coordinates):
        """Numbers of the elements of a box, [block], and which of them lie within the shape."""
        self._check(coordinates)
        inside, place = torch.tensor(True), torch.tensor(self.first)
        for axis, (at, n, stride, count) in enumerate(
            zip(coordinates, self.shape, self.strides, self.block, strict=True)
        ):
            line = int(at) + torch.arange(count).view([-1] + [1] * (len(self.shape) - 1 - axis))
            inside, place = inside & (line >= 0) & (line < n), place + line * (stride * self.size)
        place, inside = place.expand(self.block) // self.size, inside.expand(self.block)
        used = place[inside]
        if used.numel() and not (0 <= int(used.min()) and int(used.max()) < len(self.memory)):
            raise KernelError("the copy engine leaves the tensor")
        return place, inside

    def _whole(self, coordinates):
        """A box as a view, faster than element by element; None if a part is not within the shape or the tensor."""
        self._check(coordinates)
        sizes = list(zip(coordinates, self.shape, self.strides, self.block, strict=True))
        place = self.first + sum(at * stride * self.size for at, _, stride, _ in sizes)
        place = ((place + (1 << 63)) % (1 << 64) - (1 << 63)) // self.size
        last = place + sum((count - 1) * stride for _, _, stride, count in sizes)
        if any(at < 0 or at + count > n for at, n, _, count in sizes) or place < 0 or last >= len(self.memory):
            return None
        return self.memory.as_strided(self.block, self.strides, place)

    def read(self, coordinates):
        whole = self._whole(coordinates)
        if whole is not None:
            return whole
        place, inside = self._box(coordinates)
        return torch.where(inside, self.memory[place.masked_fill(~inside, 0)], 0)

    def write(self, coordinates, values):
        place, inside = self._box(coordinates)
        self.memory[place[inside]] = values[inside]


class Shared:
    """Shared memory, NaN at the start."""

    def __init__(self, memory):
        self.memory = memory

    dtype = property(lambda self: self.memory.dtype)
    shape = property(lambda self: list(self.memory.shape))

    def index(self, at):
        if not 0 <= int(at) < len(self.memory):
            raise KernelError(f"buffer {int(at)} of {len(self.memory)}")
        return Shared(self.memory[int(at)])

    def slice(self, start, length, dim=0):
        return Shared(self.memory.narrow(dim, int(start), int(length)))

    def permute(self, order):
        return Shared(self.memory.permute(*order))

    def reshape(self, shape):
        return Shared(self.memory.view(*shape))

    def store(self, values):
        _machine().pause()
        self.memory.copy_(values)
        _machine().written(self.memory)

    def load(self, layout):
        _machine().pause()
        return self.memory.clone()


class Barriers(list):
    def index(self, at):
        return self[int(at)]


class Product(Flight):
    """A matrix product that a warpgroup has issued; its value exists once it was waited for."""

    def __init__(self, machine, a, b, acc, use_acc):
        self.machine, self.operands, self.waited, self.value = machine, (a, b, acc, use_acc), False, None
        super().__init__(self._multiply)

    def _multiply(self):
        a, b, acc, use_acc = self.operands
        for operand in (a, b):
            if isinstance(operand, Shared):
                self.machine.read_by_engine(operand.memory)
        a, b = (x.memory if isinstance(x, Shared) else x for x in (a, b))
        self.value = a.float() @ b.float()
        if use_acc:
            self.value = self.value + (acc.value if isinstance(acc, Product) else acc)

    def _early(self, *_):
        raise KernelError("the result of a product is used before warpgroup_mma_wait has given it")

    __getattr__ = __getitem__ = _early
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _early


def warpgroup_mma(a, b, acc, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
    if not isinstance(b, Shared):
        raise KernelError("the right operand of a warpgroup's product lies in shared memory")
    machine = _machine()
    product = Product(machine, a, b, acc, use_acc)
    machine.launch(product, machine.current.products)
    return product if is_async else warpgroup_mma_wait(0, deps=(product,))


def warpgroup_mma_wait(num_outstanding=0, deps=None):
    machine = _machine()
    machine.pause()
    products = machine.current.products
    while len(products) > num_outstanding:
        product = products.pop(0)
        product.land()
        product.waited = True
    values = []
    for dep in deps:
        if isinstance(dep, Product) and not dep.waited:
            raise KernelError("a product's result is asked for that warpgroup_mma_wait leaves in flight")
        values.append(dep.value if isinstance(dep, Product) else dep)
    return values[0] if len(values) == 1 else tuple(values)


def fence_async_shared(cluster=False):
    _machine().fence()


def _true(pred):
    return bool(pred)


class mbarrier:
    MBarrierLayout = staticmethod(lambda *_: BARRIERS)

    @staticmethod
    def init(barrier, count):
        barrier.init(int(count))

    @staticmethod
    def expect(barrier, size, pred=True):
        if _true(pred):
            _machine().pause()
            barrier.arrive(1, int(size))

    @staticmethod
    def arrive(barrier, *, count=1, pred=True):
        if _true(pred):
            _machine().pause()
            barrier.arrive(int(count))

    @staticmethod
    def wait(barrier, phase, pred=True, deps=()):
        if _true(pred):
            _machine().pause(lambda: barrier.passed(int(phase)))


class tma:
    @staticmethod
    def async_load(descriptor, coordinates, barrier, destination, pred=True):
        if not _true(pred):
            return
        if list(destination.shape) != list(descriptor.block):
            raise KernelError(f"a box {descriptor.block} does not fit a buffer {list(destination.shape)}")
        coordinates, memory, machine = [int(c) for c in coordinates], destination.memory, _machine()
        memory.fill_(float("nan"))  # the engine may write from now on

        def land():
            memory.copy_(descriptor.read(coordinates))
            barrier.deliver(descriptor.block_type.nbytes)

        machine.launch(Flight(land), machine.loads)

    @staticmethod
    def async_store(descriptor, coordinates, source):
        coordinates, memory, machine = [int(c) for c in coordinates], source.memory, _machine()
        machine.read_by_engine(memory)
        machine.launch(
            Flight(lambda: descriptor.write(coordinates, memory.reshape(descriptor.block))), machine.current.stores
        )

    @staticmethod
    def store_wait(pendings):
        machine = _machine()
        machine.pause()
        stores = machine.current.stores
        while len(stores) > pendings:
            stores.pop(0).land()


def _tensor(x, like=None):
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=None if like is None else like.dtype)


def _both(operation):
    def apply(a, b):
        a = _tensor(a, b if isinstance(b, torch.Tensor) else None)
        return operation(a, _tensor(b, a))

    return apply


def load(pointer, mask=None, other=None):
    values = pointer.tensor.view(-1)[pointer._places(mask)]
    return values if mask is None else torch.where(mask, values, _tensor(0 if other is None else other, values))


def store(pointer, value, mask=None):
    places = pointer._places(mask)
    if mask is None:
        pointer.tensor.view(-1)[places] = value.to(pointer.tensor.dtype)
    else:
        pointer.tensor.view(-1)[places[mask]] = value[mask].to(pointer.tensor.dtype)


def atomic_add(pointer, value):
    """The old value, as a number; the programs of a launch run one after the other."""
    _machine().pause()
    place = pointer._places(None)
    old = pointer.tensor.view(-1)[place].clone()
    pointer.tensor.view(-1)[place] += value
    return old


def where(condition, a, b):
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        raise KernelError("where() of two constants has no type here")
    return torch.where(condition, _tensor(a, b), _tensor(b, a))


def allocate_shared_memory(dtype, shape, layout):
    if layout == BARRIERS:
        return Barriers(Barrier() for _ in range(shape[0]))
    start = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min // 3
    return Shared(torch.full(shape, start, dtype=dtype))


def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs):
    program = _here.program

    def body(function, args):
        def run():
            with program:
                function(*args)

        return run

    names = [f"{function.__name__}[{number}]" for number, (function, _) in enumerate(functions_and_args)]
    program.machine.run(
        [(name, body(function, args)) for name, (function, args) in zip(names, functions_and_args, strict=True)]
    )


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    """PTX that reads special registers, multiplies and adds; the result is `$0`."""
    program = _here.program
    special = {f"%{name}.{axis}": value[i] for name, value in (("ctaid", program.ids), ("nctaid", program.grid))
               for i, axis in enumerate("xyz")}  # fmt: skip
    operations = {"mov.u32": lambda a: a, "mad.lo.u32": lambda a, b, c: a * b + c}
    numbers = {}
    for statement in filter(None, (part.strip() for part in asm.strip("{} ").split(";"))):
        name, operands = statement.split(maxsplit=1)
        if name != ".reg":
            target, *sources = (operand.strip() for operand in operands.split(","))
            numbers[target] = operations[name](*(special.get(x, numbers.get(x)) for x in sources))
    return torch.tensor(numbers["$0"], dtype=dtype)


def _layout(*_, **__):
    return None


gl = types.SimpleNamespace(
    float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32, int32=torch.int32, int64=torch.int64,
    constexpr=None,
    NVMMADistributedLayout=_layout, NVMMASharedLayout=_layout, DotOperandLayout=_layout, SliceLayout=_layout,
    BlockedLayout=_layout, SwizzledSharedLayout=_layout, num_warps=lambda: 4,
    static_range=range,
    program_id=lambda axis: torch.tensor(_here.program.ids[axis], dtype=torch.int32),
    num_programs=lambda axis: torch.tensor(_here.program.grid[axis], dtype=torch.int32),
    cdiv=lambda a, b: (a + b - 1) // b,
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout=None: torch.as_tensor(value, dtype=dtype).expand(shape).clone(),
    arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    convert_layout=lambda value, layout: value,
    minimum=_both(torch.minimum), maximum=_both(torch.maximum),
    exp2=torch.exp2, log2=torch.log2,
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
    where=where, load=load, store=store, atomic_add=atomic_add, inline_asm_elementwise=inline_asm_elementwise,
    allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize,
)  # fmt: skip
