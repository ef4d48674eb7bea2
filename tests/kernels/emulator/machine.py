"""One program of a Gluon kernel on CPU threads: partitions, barriers, shared memory, and work that goes on meanwhile.

One thread runs at a time. At every operation that another partition or an engine can notice, a seeded choice says who
goes on: a partition, or a copy or product in flight. The same seed gives the same run, and a program in which nothing
can go on is a deadlock, reported at once.
"""

import contextlib
import linecache
import pathlib
import random
import sys
import threading

import torch

ORDERS = ("random", "eager", "lazy")
OWN_FILES = {str(pathlib.Path(__file__).with_name(name)) for name in ("__init__.py", "language.py", "machine.py")}


class KernelError(Exception):
    """The kernel does what a GPU does not forgive."""


class Deadlock(KernelError):
    """No partition can go on, and nothing is in flight."""


class _Stopped(BaseException):
    """Ends a partition whose machine has failed."""


class Barrier:
    """An mbarrier: a phase completes with `count` arrivals and with all the bytes that it was told to expect."""

    def __init__(self):
        self.count, self.missing, self.bytes, self.completed = 0, 0, 0, 0

    def init(self, count):
        self.count = self.missing = count

    def arrive(self, count, expected=0):
        if not self.count:
            raise KernelError("a barrier is used that was not initialised")
        if self.missing < count:
            raise KernelError(f"a barrier of {self.count} arrivals a phase got more")
        self.missing -= count
        self.bytes += expected
        self._complete()

    def deliver(self, count):
        self.bytes -= count
        self._complete()

    def _complete(self):
        if not self.missing and not self.bytes:
            self.completed += 1
            self.missing = self.count

    def passed(self, phase):
        """Whether the phase of this parity has completed, as `mbarrier.try_wait.parity` has it."""
        return self.completed & 1 != phase


class Partition:
    """A partition's thread, what it waits for, and its products and stores in flight, oldest first."""

    def __init__(self, name, body):
        self.name, self.body = name, body
        self.turn = threading.Semaphore(0)
        self.ready = None  # None: it can go on; else a function that says whether it can
        self.where = None  # the file and line at which it waits; None: at its start
        self.done = False
        self.products, self.stores = [], []


class Flight:
    """A copy or product in flight: `land` does it, at any time until it is waited for."""

    def __init__(self, land):
        self._land, self.landed = land, False

    def land(self):
        if not self.landed:
            self.landed = True
            self._land()


class Machine:
    """Runs the partitions of one program.

    Args:
        seed: of every choice.
        order: "random"; "eager", what is in flight lands before a partition goes on; or "lazy", it lands when it must.
    """

    def __init__(self, seed=0, order="random"):
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        self.choice, self.order = random.Random(seed), order
        self.partitions, self.current = [], None
        self.loads = []
        self.unfenced = []  # (partition, memory) written by threads, not yet ordered before the engines' reads
        self.failure, self.finished = None, threading.Event()

    def run(self, bodies):
        """Run functions as partitions until all have ended.

        Raises:
            KernelError: a deadlock, or what a GPU does not forgive. The functions' own errors come as they are.
        """
        self.partitions = [Partition(name, body) for name, body in bodies]
        threads = [threading.Thread(target=self._live, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.finished.wait()
        for thread in threads:
            thread.join()
        self.partitions = []
        if self.failure is not None:
            raise self.failure

    def pause(self, ready=None):
        """Let others go on; returns when this partition is chosen and `ready()` holds. Without partitions, at once."""
        me = self.current
        if me is None:
            return
        me.ready, me.where = ready, _caller()
        self._pass_on()
        me.turn.acquire()
        self._check()
        me.ready = None

    def launch(self, flight, queue):
        """Put something in flight."""
        queue.append(flight)
        self.pause()
        return flight

    def written(self, memory):
        """Note a write to shared memory by threads."""
        self.unfenced.append((self.current, memory))

    def fence(self):
        """Order this partition's writes before what the engines read."""
        self.unfenced = [(who, memory) for who, memory in self.unfenced if who is not self.current]

    def read_by_engine(self, memory):
        """See that threads' writes to this memory were fenced."""
        first, last = _extent(memory)
        for who, other in self.unfenced:
            left, right = _extent(other)
            if first < right and left < last:
                name = "the program" if who is None else who.name
                raise KernelError(f"shared memory written by {name} is read by an engine without fence_async_shared")

    @torch.no_grad()  # which is each thread's own
    def _live(self, partition):
        partition.turn.acquire()
        try:
            self._check()
            partition.body()
            if partition.products or partition.stores:
                raise KernelError(f"{partition.name} ends with work in flight that it has not waited for")
        except _Stopped:
            pass
        except BaseException as error:
            self._fail(error)
        partition.done = True
        with contextlib.suppress(_Stopped):
            self._pass_on()

    def _check(self):
        if self.failure is not None:
            raise _Stopped

    def _fail(self, error):
        if self.failure is None:
            self.failure = error
        for partition in self.partitions:
            partition.turn.release()

    def _pass_on(self):
        """Let flights land until a partition is chosen, and give it the turn."""
        try:
            while self.failure is None:
                able = [p for p in self.partitions if not p.done and (p.ready is None or p.ready())]
                flights = self._flights()
                if all(p.done for p in self.partitions):
                    if flights:
                        raise KernelError("the program ends while a copy into its shared memory is in flight")
                    break
                if not able and not flights:
                    raise Deadlock(self._standstill())
                if flights and (self.order == "eager" or not able or (self.order == "random" and self._flip())):
                    self.choice.choice(flights).land()
                    continue
                self.current = self.choice.choice(able)
                self.current.turn.release()
                return
        except BaseException as error:
            self._fail(error)
        self.current = None
        if all(p.done for p in self.partitions):
            self.finished.set()

    def _flip(self):
        return self.choice.random() < 0.5

    def _flights(self):
        """What may land next: any load, and each partition's oldest product and store."""
        self.loads = [load for load in self.loads if not load.landed]
        queues = [queue for p in self.partitions for queue in (p.products, p.stores)]
        oldest = (next((flight for flight in queue if not flight.landed), None) for queue in queues)
        return self.loads + [flight for flight in oldest if flight is not None]

    def _standstill(self):
        stuck = [f"{p.name} at {_line(p.where)}" for p in self.partitions if not p.done]
        return "nothing can go on: " + "; ".join(stuck)


def _extent(memory: torch.Tensor) -> tuple[int, int]:
    start = memory.data_ptr()
    return start, start + memory.numel() * memory.element_size()


def _caller() -> tuple[str, int]:
    """The kernel's own file and line: of the innermost frame outside the emulator."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename in OWN_FILES:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _line(where: tuple[str, int] | None) -> str:
    if where is None:
        return "its start"
    name, number = where
    return f"{pathlib.Path(name).name}:{number} ({linecache.getline(name, number).strip()})"
