"""Attention between processes that hold ranges of a sequence: queries stay, keys and values travel.

A process attends with its visual queries to its own range, to all text and conditioning keys, and to the ranges that
the plan's lists name; other ranges are not sent. Text and conditioning queries attend to everything, so they travel
themselves: each process attends with all of them to its own keys, and their partial results return. Partial results
merge by log-sum-exp. The backward pass fetches the keys again.

Source: ring attention, arXiv:2310.01889; text and conditioning as in `plans.several_gpus`, which predicts the traffic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import dense, portable
from dit_accel.kernels.block_sparse.api import in_autocast_dtype
from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry, Segments
from dit_accel.kernels.block_sparse.held import Held, Runs
from dit_accel.pipelines.sharding import exchange
from dit_accel.plans.plan import Plan, PlanArguments
from dit_accel.plans.ranges import Range, reads
from dit_accel.plans.static import StaticPlan


@dataclasses.dataclass
class Traffic:
    """What a process has exchanged in attention calls, forward.

    Attributes:
        calls: of attention between processes.
        exchanged: values sent in the all-to-alls of Ulysses.
        fetched: values received from other ranges.
        transfers, possible: transfers of a range's visual keys to another one, of all processes with the same heads;
            those that dense attention makes.
    """

    calls: int = 0
    exchanged: int = 0
    fetched: int = 0
    transfers: int = 0
    possible: int = 0

    def __str__(self) -> str:
        ring = f", {self.transfers:,} of {self.possible:,} transfers in the ring" if self.possible else ""
        values = f"{self.exchanged:,} values sent by all-to-all and {self.fetched:,} fetched by this process"
        return f"{self.calls:,} attention calls between processes{ring}, {values}"


@dataclasses.dataclass(frozen=True)
class Ring:
    """The processes that hold the ranges of a sequence, for the same heads.

    Args:
        group: the processes, in the order of `ranges`.
        rank: of this process in the group.
        ranges: what each holds.
        traffic: counts.
    """

    group: Any
    rank: int
    ranges: tuple[Range, ...]
    traffic: Traffic

    def attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> Tensor:
        """A static plan's attention: q, k, v and the result [B, H, n, D], this process's range in model order."""
        assert isinstance(plan, StaticPlan)
        text = self.ranges[self.rank].text
        q, k, v = in_autocast_dtype(q, k, v)
        first = text[1] - text[0] if plan.grid.text_first else 0
        needed = reads(plan, self.ranges)
        pairs = len(self.ranges) * (len(self.ranges) - 1)
        self.traffic.transfers += int(needed.sum()) - int(needed.diagonal().sum())
        self.traffic.possible += pairs
        scale = q.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
        lists, segments = plan.lists(q.device), Segments.of(q, call.text_lens)
        job = RingAttention(self, needed.tolist(), lists, segments, plan.geometry, scale)
        out: Tensor = _RingAttention.apply(*(_rolled(x, first) for x in (q, k, v)), job)
        return _rolled(out, out.shape[2] - first)

    @property
    def dense_rows(self) -> list[Tensor]:
        """Each process's text and conditioning tokens among all of them, numbered canonically: int64 [n] each."""
        conditioning = max(span.conditioning[1] for span in self.ranges)
        runs = [((span.conditioning, 0), (span.text, conditioning)) for span in self.ranges]
        return [torch.cat([torch.arange(a + first, b + first) for (a, b), first in span]) for span in runs]

    @exchange
    def trade(self, sent: list[Tensor], shapes: list[tuple[int, ...]], count: bool) -> tuple[Any, list[Tensor]]:
        """Send the r-th tensor to process r, receive one of the r-th shape from it; wait for what comes first."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.cat([tensor.reshape(-1) for tensor in sent])
        received = flat.new_empty(sum(sizes))
        if count:
            self.traffic.fetched += sum(sizes) - sizes[self.rank]
        into = [tensor.numel() for tensor in sent]
        work = torch.distributed.all_to_all_single(received, flat, sizes, into, group=self.group, async_op=True)
        return (work, flat), [piece.view(shape) for piece, shape in zip(received.split(sizes), shapes, strict=True)]

    def gather_dense(self, x: Tensor, count: bool = False) -> Tensor:
        """The text and conditioning rows of all processes, from this one's: [..., n, D] to [..., all, D]."""
        rows = self.dense_rows
        shapes = [(*x.shape[:-2], len(places), x.shape[-1]) for places in rows]
        pieces = finish(*self.trade([x] * len(rows), shapes, count))
        return torch.cat(pieces, -2)[..., torch.cat(rows).argsort().to(x.device), :]

    def return_dense(self, x: Tensor, count: bool = False) -> list[Tensor]:
        """What each process found for this one's text and conditioning rows, from what it found for all: [..., D]."""
        sent = [x[..., places.to(x.device), :] for places in self.dense_rows]
        return finish(*self.trade(sent, [sent[self.rank].shape] * len(sent), count))

    def peers(self, step: int) -> tuple[int, int]:
        """The processes of which this one reads in a step of the ring, and which read of it."""
        return (self.rank + step) % len(self.ranges), (self.rank - step) % len(self.ranges)


@exchange
def finish(sending: tuple[Any, Tensor], received: list[Tensor]) -> list[Tensor]:
    """What `Ring.trade` receives, when it is there."""
    sending[0].wait()
    return received


@dataclasses.dataclass(frozen=True, eq=False)
class RingAttention:
    """One attention call of a ring.

    Its tensors hold this process's range, canonically ordered: [B, H, visual | conditioning | text, D].

    Args:
        ring: the processes.
        needed: [queries' range][keys' range], whether visual keys travel.
        lists, geometry: of the whole sequence.
        segments: each sample's length of text.
        scale: factor of the logits.
    """

    ring: Ring
    needed: list[list[bool]]
    lists: BlockLists
    segments: Segments
    geometry: Geometry
    scale: float

    @property
    def local(self) -> Range:
        return self.ring.ranges[self.ring.rank]

    def dense_runs(self, of: Range | None = None) -> Runs:
        """Canonical runs of a range's conditioning and text; of the whole sequence's without one."""
        grid = self.geometry.key_order.grid
        conditioning, text = ((0, grid.conditioning), (0, grid.text)) if of is None else (of.conditioning, of.text)
        firsts = grid.visual, grid.visual + grid.conditioning
        return tuple((a + first, b + first) for (a, b), first in zip((conditioning, text), firsts, strict=True))

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> BlockSparseInputs:
        return BlockSparseInputs(q, k, v, self.lists, self.segments, self.geometry, self.scale)

    def parts(self) -> tuple[Held, Held]:
        """What visual queries attend to in this process, and what all text and conditioning queries do."""
        every, local = self.dense_runs(), self.local
        return Held((local.visual,), (local.visual, *every)), Held(every, (local.visual, *self.dense_runs(local)))

    def fetch(self, kv: Tensor, count: bool) -> Iterator[tuple[int, Tensor | None]]:
        """The steps of the ring: the range that this process reads, and its keys and values, if it needs them.

        Args:
            kv: visual keys and values of this range, [2, B, H, n, D]. Those of the next step travel meanwhile.
        """
        ring, waiting = self.ring, None
        for step in (*self.steps(), None):
            started = None
            if step is not None:
                source, target = ring.peers(step)
                sent = [
                    kv if rank == target and self.needed[target][ring.rank] else kv[:0]
                    for rank in range(len(ring.ranges))
                ]
                reads_it = self.needed[ring.rank][source]
                shapes = [
                    (2 * (rank == source and reads_it), *kv.shape[1:3], span.visual_tokens, kv.shape[4])
                    for rank, span in enumerate(ring.ranges)
                ]
                started = source, ring.trade(sent, shapes, count)
            if waiting is not None:
                source, trade = waiting
                received = finish(*trade)[source]
                yield source, received if len(received) else None
            waiting = started

    def steps(self) -> list[int]:
        """The steps of the ring in which some range is read."""
        ranks = len(self.ring.ranges)
        return [s for s in range(1, ranks) if any(self.needed[rank][(rank + s) % ranks] for rank in range(ranks))]

    def give_back(self, source: int, grads: Tensor | None, kv: Tensor) -> Tensor | None:
        """Return the gradients of a step's keys and values to their range; those of this range, if somebody read it."""
        ring = self.ring
        target = ring.peers((source - ring.rank) % len(ring.ranges))[1]
        sent = [kv[:0] if grads is None or rank != source else grads for rank in range(len(ring.ranges))]
        read = self.needed[target][ring.rank]
        shapes = [(2 * (rank == target and read), *kv.shape[1:]) for rank in range(len(ring.ranges))]
        received = finish(*ring.trade(sent, shapes, count=False))[target]
        return received if len(received) else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, H, n, D] in the dtype of q and LSE [B, H, n]."""
        visual, has_dense = self.local.visual_tokens, self.geometry.conditioning + self.geometry.text > 0
        wide = torch.promote_types(q.dtype, torch.float32)
        around = self.ring.gather_dense(torch.stack((q, k, v))[..., visual:, :], count=True) if has_dense else None
        of_visual, of_dense = self.parts()
        queries, kv = q[:, :, :visual], torch.stack((k, v))[..., :visual, :]
        near = kv if around is None else torch.cat((kv, around[1:]), -2)
        out, lse = portable.forward(self.call(queries, *near), of_visual)
        out = out.to(wide)
        for source, far in self.fetch(kv, count=True):
            if far is not None:
                held = Held((self.local.visual,), (self.ring.ranges[source].visual,))
                dense.merge(out, lse, *portable.forward(self.call(queries, *far), held))
        if around is None:
            return out.to(q.dtype), lse
        part, sums = portable.forward(self.call(around[0], k, v), of_dense)
        partial = self.ring.return_dense(torch.cat((part.to(wide), sums[..., None]), -1), count=True)
        outs, lses = dense.empty_output(q[:, :, visual:].to(wide))
        for result in partial:
            dense.merge(outs, lses, result[..., :-1], result[..., -1])
        return torch.cat((out, outs), 2).to(q.dtype), torch.cat((lse, lses), 2)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        visual, has_dense = self.local.visual_tokens, self.geometry.conditioning + self.geometry.text > 0
        wide, stacked = torch.promote_types(q.dtype, torch.float32), torch.stack((q, k, v))
        sums = torch.zeros_like(stacked, dtype=wide)  # [3, B, H, n, D]
        around = self.ring.gather_dense(stacked[..., visual:, :]) if has_dense else None
        of_visual, of_dense = self.parts()
        upstream, queries, outs, lses = (x[:, :, :visual] for x in (grad, q, out, lse))
        kv = stacked[1:, ..., :visual, :]
        near = kv if around is None else torch.cat((kv, around[1:]), -2)
        first = portable.backward(upstream, None, outs, lses, self.call(queries, *near), of_visual)
        for total, part in zip(sums, first, strict=True):
            total[:, :, :visual] += part[:, :, :visual]
        for source, far in self.fetch(kv, count=False):
            grads = None
            if far is not None:
                held = Held((self.local.visual,), (self.ring.ranges[source].visual,))
                of_q, *of_kv = portable.backward(upstream, None, outs, lses, self.call(queries, *far), held)
                sums[0, :, :, :visual] += of_q
                grads = torch.stack(of_kv)
            returned = self.give_back(source, grads, kv)
            if returned is not None:
                sums[1:, ..., :visual, :] += returned
        if around is None:
            return tuple(sums.to(q.dtype))
        packed = torch.cat((*(x[:, :, visual:].to(wide) for x in (grad, out)), lse[:, :, visual:, None]), -1)
        packed = self.ring.gather_dense(packed)
        upstream, outs = (x.to(q.dtype) for x in packed[..., :-1].chunk(2, -1))
        last = portable.backward(upstream, None, outs, packed[..., -1], self.call(around[0], k, v), of_dense)
        sums[1:] += torch.stack(last[1:])
        of_dense_rows = torch.stack((last[0], *(part[:, :, visual:] for part in first[1:]))).to(wide)
        sums[..., visual:, :] += sum(self.ring.return_dense(of_dense_rows))
        return tuple(sums.to(q.dtype))


class _RingAttention(torch.autograd.Function):
    """`RingAttention` as one function, so that all processes run the exchanges of its backward in one order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: RingAttention) -> Tensor:
        out, lse = job.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job = job
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.job.backward(grad, *ctx.saved_tensors), None


def _rolled(x: Tensor, first: int) -> Tensor:
    """x [B, H, n, D] with its first rows behind all others."""
    return x if first in (0, x.shape[2]) else torch.cat((x[:, :, first:], x[:, :, :first]), 2)
