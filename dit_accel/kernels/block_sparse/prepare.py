"""Preparation of block lists, once per plan: batches of dense problems."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.dense import Rows
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Placement, Predicate
from dit_accel.kernels.block_sparse.grouping import MAX_PAIRS, group_rows, parts_of
from dit_accel.kernels.block_sparse.held import Held, HeldPlacement

MASK_BYTES = 96 << 20  # of masks that a preparation keeps; each call evaluates further ones, a batch at a time
MAX_ENTRIES, HELD_ENTRIES = 8, 64  # preparations kept, of calls with all tokens and with some

_EMPTY, _PARTIAL, _FULL = 0, 1, 2

Mask = tuple[Tensor | None, Tensor | None]  # bias [nq, nk] and the rows that it forbids wholly, bool [nq]


@dataclasses.dataclass
class Batch:
    """Equal problems: G groups of nq queries over nk keys, by canonical token index.

    Indices ascend along each row, so that text keys are the last ones.

    Args:
        q, k: int64 [G, nq], [G, nk].
        bias: fp32 [nq, nk], 0 or -inf, shared by the groups; None without mask or with `evaluate`, which returns it.
        merged: an earlier batch may hold the same queries over other keys.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    merged: bool
    evaluate: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        self._blind = None if self.bias is None else _blind(self.bias)
        self._placed: tuple[tuple, Rows, Rows] | None = None

    def placed(self, geometry: Geometry, place: Placement | HeldPlacement) -> tuple[Rows, Rows, Mask] | None:
        """Rows in memory of one sample's queries and keys, and the mask; None if no key is valid."""
        latest = self._placed  # read once: other threads may place other samples
        if latest is None or latest[0] != (geometry, place):
            grid = geometry.key_order.grid
            valid = int((self.k[0] < grid.tokens - grid.text + place.text_len).sum())
            if not valid:
                return None
            at_q, at_k = place.rows(geometry)
            places = Rows(at_q.to(self.q.device)[self.q]), Rows(at_k.to(self.k.device)[self.k[:, :valid]])
            self._placed = latest = (geometry, place), *places
        _, rows_q, rows_k = latest
        bias, blind = (self.evaluate(), None) if self.evaluate else (self.bias, self._blind)
        if bias is not None and (self.evaluate or rows_k.shape[1] < self.k.shape[1]):
            bias = bias[:, : rows_k.shape[1]]
            blind = _blind(bias)
        return rows_q, rows_k, (bias, blind)


def _blind(bias: Tensor) -> Tensor | None:
    blind = bias.isneginf().all(-1)
    return blind if bool(blind.any()) else None


class _Masks:
    """The token mask of any set of queries and keys, from the map of blocks and the tables."""

    def __init__(self, state: Tensor, geometry: Geometry, tables: Tensor | None) -> None:
        self.state = state  # uint8 [q_blocks, k_blocks]
        self.visual_q, self.visual_k = geometry.query_order.grid.visual, geometry.key_order.grid.visual
        self.block_of_q = geometry.query_order.block_of_token()
        self.block_of_k = geometry.key_order.block_of_token()
        self.predicate = None if tables is None else Predicate(tables, geometry.query_grid, geometry.grid)

    def allowed(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Bool [nq, nk] for ascending canonical indices q [nq], k [nk]; None if all pairs are allowed."""
        blocks_q, inverse_q = self.block_of_q[q].unique(return_inverse=True)
        blocks_k, inverse_k = self.block_of_k[k].unique(return_inverse=True)
        state = self.state[blocks_q][:, blocks_k]
        if bool((state == _FULL).all()):
            return None
        state = state[inverse_q][:, inverse_k]
        allowed = state == _FULL
        nq, nk = int((q < self.visual_q).sum()), int((k < self.visual_k).sum())
        if self.predicate is not None and nq and nk:
            pairs = self.predicate.allowed(q[None, :nq], k[None, :nk])[0]
            allowed[:nq, :nk] |= pairs & (state[:nq, :nk] == _PARTIAL)
        return allowed

    def bias(self, q: Tensor, k: Tensor, device: torch.device) -> Tensor:
        """`allowed`, where not all pairs are, as a term of the logits."""
        allowed = self.allowed(q, k)
        assert allowed is not None
        return as_bias(allowed).to(device)


def as_bias(allowed: Tensor) -> Tensor:
    """A mask as a term of the logits: fp32, 0 or -inf."""
    return torch.zeros(allowed.shape, dtype=torch.float32, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def check_lists(lists: BlockLists, key_blocks: int) -> Tensor:
    """`lists.used`, checked.

    Raises:
        DitAccelError: a count is above the width of the lists, or an index not below `key_blocks`.
    """
    kv_indices, kv_counts, used = lists.indices, lists.counts, lists.used
    width = kv_indices.shape[-1]
    if kv_counts.numel() and not 0 <= int(kv_counts.min()) <= int(kv_counts.max()) <= width:
        raise DitAccelError(
            f"kv_counts must be between 0 and the width {width} of kv_indices, got {int(kv_counts.min())} to "
            f"{int(kv_counts.max())}."
        )
    listed = kv_indices[used]
    if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < key_blocks:
        raise DitAccelError(
            f"kv_indices must name key blocks 0 to {key_blocks - 1}, got {int(listed.min())} to {int(listed.max())}."
        )
    return used


def block_state(lists: BlockLists, used: Tensor, geometry: Geometry) -> Tensor:
    """Lists as a map: uint8 [q_blocks, k_blocks], 0 not listed, 1 decided by the tables, 2 attended whole."""
    queries, keys = geometry.orders
    state = lists.map(used, keys.blocks).to(torch.uint8) * _FULL
    if lists.tables is not None:
        partial = lists.map(used if lists.partial is None else used & lists.partial, keys.blocks).to(torch.uint8)
        state[: queries.visual_blocks, : keys.visual_blocks] -= partial[: queries.visual_blocks, : keys.visual_blocks]
    return state


def build(lists: BlockLists, geometry: Geometry, device: torch.device, held: Held | None = None) -> list[Batch]:
    """Batches that together hold every allowed pair of lists on a CPU exactly once; with `held` of its tokens alone."""
    every = tuple(order.index() for order in geometry.orders) if held is None else held.cut(geometry)
    q_slots, k_slots = every[0].view(-1, geometry.block_q), every[1].view(-1, geometry.block_k)
    used = check_lists(lists, len(k_slots))
    state = block_state(lists, used, geometry)
    sizes = (q_slots >= 0).sum(1), (k_slots >= 0).sum(1)
    state *= (sizes[0] > 0)[:, None] & (sizes[1] > 0)
    if not bool(state.any()):
        return []
    left_state = state.clone()  # without the blocks of groups that are not merged
    masks, left_masks = (_Masks(states, geometry, lists.tables) for states in (state, left_state))
    equal: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    biases: dict[bytes, Tensor] = {}
    free = MASK_BYTES
    first_text = geometry.key_order.grid.visual + geometry.conditioning
    batches: list[Batch] = []
    raster = geometry.query_order.tile is None and geometry.key_order.tile is None
    for group, blocks, merged in group_rows(state > 0, state == _FULL, *sizes, raster):
        queries, keys = (slots.flatten().sort().values for slots in (q_slots[group], k_slots[blocks]))
        queries, keys = queries[queries >= 0], keys[keys >= 0]
        here = left_masks if merged else masks
        whole = bool((here.state[group][:, blocks] == _FULL).all())
        if not merged:
            left_state[torch.tensor(group)[:, None], blocks.nonzero().squeeze(1)] = _EMPTY
        for q in (queries,) if whole else queries.split(max(1, MAX_PAIRS // len(keys))):
            mask = None if whole else here.allowed(q, keys)
            parts = parts_of(q, keys, mask)
            for number, part in enumerate(parts):
                k, allowed, later = keys[part], None if mask is None else mask[:, part], merged or number > 0
                if allowed is not None and bool(allowed.all()):
                    allowed = None
                texts = int((k >= first_text).sum())
                # text keys are cut off by their number, which must be equal in all groups of a batch
                kind = texts if texts in (0, geometry.text) else (len(batches), len(equal))
                digest = b""
                if allowed is not None:
                    digest = hashlib.blake2b(allowed.numpy().tobytes(), digest_size=16).digest()
                    if digest not in biases and free >= 4 * allowed.numel():
                        free -= 4 * allowed.numel()
                        biases[digest] = as_bias(allowed).to(device)
                if allowed is None or digest in biases:
                    equal[later, len(q), len(k), kind, len(parts) > 1, digest].append((q, k))
                else:
                    evaluate = functools.partial(here.bias, q, k, device)
                    batches.append(Batch(q[None].to(device), k[None].to(device), None, later, evaluate))
    for (merged, *_, views, digest), members in equal.items():
        members.sort(key=lambda member: (int(member[0][0]), int(member[1][0])))
        for some in _sequences(members) if views else [members]:
            q, k = (torch.stack(side).to(device) for side in zip(*some, strict=True))
            batches.append(Batch(q, k, biases.get(digest), merged))
    return sorted(batches, key=lambda batch: batch.merged)


def _sequences(members: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Members in long sequences of equally distant queries and keys, whose batches are views."""
    left = {(int(q[0]), int(k[0])): (q, k) for q, k in members}
    while left:
        start = next(iter(left))
        best = [start]
        for second in itertools.islice(left, 1, 17):
            steps = [b - a for a, b in zip(start, second, strict=True)]
            chain = [start]
            while steps[0] >= len(members[0][0]) and steps[1] >= 0 and chain[-1] in left:
                chain.append((chain[-1][0] + steps[0], chain[-1][1] + steps[1]))
            best = max(best, chain[:-1], key=len)
        yield [left.pop(place) for place in best]


@dataclasses.dataclass(eq=False)
class _Entry:
    key: tuple
    lists: tuple[Tensor | None, ...]  # copies, on the lists' device
    owner: StorageWeakRef
    batches: list[Batch]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None if b is None else a is not None and torch.equal(a, b)


class PreparationCache:
    """Preparations by the content of the lists.

    Lists are compared by value, in tens of microseconds. So a list changed in place, or a new one at a freed one's
    address, finds no stale entry. A copy that `torch.compile` passes finds its own. An entry is dropped when its lists
    are freed, and the oldest one when there are too many.
    """

    def __init__(self, most: int = MAX_ENTRIES) -> None:
        self.entries: list[_Entry] = []
        self._most, self._lock = most, threading.Lock()

    def get(
        self, block_lists: BlockLists, geometry: Geometry, device: torch.device, held: Held | None = None
    ) -> list[Batch]:
        """The batches of these lists, built if they are new; their tensors are on `device`."""
        lists = block_lists[:4]
        key = (geometry, held, device, *(None if t is None else (t.shape, t.device) for t in lists))
        with self._lock:
            self.entries = [entry for entry in self.entries if not entry.owner.expired()]
            for entry in self.entries:
                if entry.key == key and all(map(_same, lists, entry.lists)):
                    self.entries.remove(entry)
                    self.entries.append(entry)
                    return entry.batches
            with torch.device("cpu"):  # whatever the caller's default device
                batches = build(BlockLists(*lists).to(torch.device("cpu")), geometry, device, held)
            copies = tuple(None if t is None else t.clone() for t in lists)
            self.entries.append(_Entry(key, copies, StorageWeakRef(block_lists.indices.untyped_storage()), batches))
            del self.entries[: -self._most]
            return batches
