"""Preparation of block lists, once per plan: batches of dense problems."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.dense import Rows
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Placement, Predicate, query_placement

# Costs in units of one (query, key) pair, measured with PyTorch's fused CPU kernel on 4 heads of 64, AVX-512 and AMX.
# Packing and gathering a key costs some 80 pairs in fp32 and 190 in 16 bits. Larger masks cost too, so the optimum over
# sliding windows and bands is flat between 24 and 96.
KEY_COST = 64
GROUP_COST = 32_768  # of starting a problem
MASK_COST = 0.15  # of a mask, per pair
MERGE_COST = 256  # of merging a query's results over two sets of keys
MASKED_QUERIES = 256  # queries of a masked problem, roughly
MAX_PAIRS = 1 << 21  # of a masked group: its mask takes at most 8 MiB in fp32
MAX_ROWS = 4096  # with more distinct rows only equal ones are grouped: the matrix of overlaps would be too large


class Group(NamedTuple):
    """A dense problem: query blocks over key blocks, in ascending order."""

    queries: list[int]
    keys: Tensor  # bool [k_blocks]
    merged: bool  # an earlier group may hold the same queries over other keys


def group_rows(listed: Tensor, whole: Tensor, query_sizes: Tensor, key_sizes: Tensor) -> list[Group]:
    """Groups that together hold each listed pair of blocks once, in the cheaper of two ways:

    * One group a query, over the union of its blocks' keys. Neighbours in a sliding window share most keys, so one
      larger problem with a mask is cheaper than two small ones.
    * First the keys that many queries see whole, without a mask; then the remaining keys in smaller groups. This suits
      a few whole frames beside a band in each of many frames.

    Args:
        listed: bool [q_blocks, k_blocks].
        whole: bool, likewise: the listed pairs of blocks that need no mask.
        query_sizes, key_sizes: valid tokens in each block, int64 [q_blocks], [k_blocks].

    Returns:
        The groups, without blocks that have no keys or tokens.
    """
    cluster = _Clustering(query_sizes.float(), key_sizes.float())
    listed = listed & (query_sizes > 0)[:, None]
    single = cluster.groups(listed, common=False)
    first = [group for group in cluster.groups(whole & listed, common=True) if cluster.worth(group)]
    left = listed.clone()
    for group in first:
        left[group.queries] &= ~group.keys
    split = first + [group._replace(merged=True) for group in cluster.groups(left, common=False)]
    return split if first and cluster.cost(split, whole) < cluster.cost(single, whole) else single


@dataclasses.dataclass
class _Clustering:
    """Merges query blocks pairwise, best pairs first, as long as the estimated cost falls."""

    sizes: Tensor  # tokens of the query blocks
    weights: Tensor  # and of the key blocks

    def cost(self, groups: list[Group], whole: Tensor) -> float:
        total = 0.0
        for group in groups:
            keys, queries = float(self.weights[group.keys].sum()), float(self.sizes[group.queries].sum())
            masked = not bool(whole[group.queries][:, group.keys].all())
            total += GROUP_COST + keys * (queries * (1 + MASK_COST * masked) + KEY_COST)
            total += MERGE_COST * queries * group.merged
        return total

    def worth(self, group: Group) -> bool:
        """Whether computing a group without a mask can pay for merging its results."""
        keys, queries = float(self.weights[group.keys].sum()), float(self.sizes[group.queries].sum())
        return keys * queries * MASK_COST > GROUP_COST + MERGE_COST * queries

    def groups(self, rows: Tensor, *, common: bool) -> list[Group]:
        """Groups of query blocks whose keys are bool [q_blocks, k_blocks].

        Equal rows are always one group: a blocked or strided window has few distinct lists. The keys of a group are
        the union of its rows, or with `common` those that all its rows share.
        """
        rows, inverse = torch.unique(rows, dim=0, return_inverse=True)
        groups: list[list[int]] = [[] for _ in rows]
        for block, row in enumerate(inverse.tolist()):
            groups[row].append(block)
        sizes = torch.zeros(len(rows), dtype=torch.float32).index_add_(0, inverse, self.sizes)
        kept = rows.float() @ self.weights > 0
        while True:
            groups = [group for group, keep in zip(groups, kept.tolist(), strict=True) if keep]
            rows, sizes = rows[kept], sizes[kept]
            pairs = self._matching(rows.float(), sizes, common) if 1 < len(groups) <= MAX_ROWS else []
            if not pairs:
                return [Group(sorted(group), row, False) for group, row in zip(groups, rows, strict=True)]
            kept = torch.ones(len(groups), dtype=torch.bool)
            for one, other in pairs:
                groups[one] += groups[other]
                rows[one] = rows[one] & rows[other] if common else rows[one] | rows[other]
                sizes[one] += sizes[other]
                kept[other] = False

    def _matching(self, rows: Tensor, sizes: Tensor, common: bool) -> list[tuple[int, int]]:
        """Disjoint pairs of groups that are cheaper together, greedily from the best."""
        keys = rows @ self.weights
        shared = (rows * self.weights) @ rows.T
        if common:
            # keys that only one of the two sees leave the group, and are masked among fewer queries
            lost = (MASK_COST + KEY_COST / MASKED_QUERIES) * sizes
            gain = GROUP_COST + KEY_COST * shared - lost[:, None] * (keys[:, None] - shared) - lost * (keys - shared)
            gain[shared == 0] = 0
        else:
            union = keys[:, None] + keys - shared
            queries = sizes[:, None] + sizes
            alone = GROUP_COST + (sizes + KEY_COST) * keys
            gain = alone[:, None] + alone - (GROUP_COST + (queries + KEY_COST) * union)
            gain[queries * union > MAX_PAIRS] = 0
        gain.fill_diagonal_(0)
        best, partner = gain.topk(min(6, len(rows)), dim=1)
        order = best.flatten().argsort(descending=True, stable=True)
        order = order[best.flatten()[order] > 0]
        taken: set[int] = set()
        pairs = []
        for one, other in zip((order // best.shape[1]).tolist(), partner.flatten()[order].tolist(), strict=True):
            if one not in taken and other not in taken:
                taken |= {one, other}
                pairs.append((one, other))
        return pairs


MASK_BYTES = 96 << 20  # of masks that a preparation keeps; each call evaluates further ones, a batch at a time
MAX_ENTRIES = 8  # preparations kept

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

    def placed(self, geometry: Geometry, place: Placement) -> tuple[Rows, Rows, Mask] | None:
        """Rows in memory of one sample's queries and keys, and the mask; None if no key is valid."""
        found = self._placed  # read once: other threads may place other samples
        if found is None or found[0] != (geometry, place):
            grid_q, grid_k = geometry.query_order.grid, geometry.key_order.grid
            valid = int((self.k[0] < grid_k.tokens - grid_k.text + place.text_len).sum())
            if not valid:
                return None
            at_q = query_placement(geometry, place).positions(grid_q.visual, grid_q.conditioning, grid_q.text)
            at_k = place.positions(grid_k.visual, grid_k.conditioning, grid_k.text)
            places = Rows(at_q.to(self.q.device)[self.q]), Rows(at_k.to(self.k.device)[self.k[:, :valid]])
            self._placed = found = (geometry, place), *places
        _, rows_q, rows_k = found
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


def block_state(lists: BlockLists, used: Tensor, blocks: int) -> Tensor:
    """Lists as a map: uint8 [q_blocks, k_blocks], 0 not listed, 1 decided by the tables, 2 attended whole."""
    state = lists.map(used, blocks).to(torch.uint8) * _FULL
    if lists.tables is not None:
        state -= lists.map(used if lists.partial is None else used & lists.partial, blocks).to(torch.uint8)
    return state


def build(lists: BlockLists, geometry: Geometry, device: torch.device) -> list[Batch]:
    """Batches that together hold every allowed pair of lists on a CPU exactly once."""
    q_slots = geometry.query_order.index().view(-1, geometry.block_q)
    k_slots = geometry.key_order.index().view(-1, geometry.block_k)
    used = check_lists(lists, len(k_slots))
    state = block_state(lists, used, len(k_slots))
    left_state = state.clone()  # without the blocks of groups that are not merged
    masks, left_masks = (_Masks(each, geometry, lists.tables) for each in (state, left_state))
    equal: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    biases: dict[bytes, Tensor] = {}
    free = MASK_BYTES
    first_text = geometry.key_order.grid.visual + geometry.conditioning
    batches: list[Batch] = []
    sizes = (q_slots >= 0).sum(1), (k_slots >= 0).sum(1)
    for group, blocks, merged in group_rows(state > 0, state == _FULL, *sizes):
        queries, keys = (slots.flatten().sort().values for slots in (q_slots[group], k_slots[blocks]))
        queries, keys = queries[queries >= 0], keys[keys >= 0]
        here = left_masks if merged else masks
        whole = bool((here.state[group][:, blocks] == _FULL).all())
        if not merged:
            left_state[torch.tensor(group)[:, None], blocks.nonzero().squeeze(1)] = _EMPTY
        for q in (queries,) if whole else queries.split(max(1, MAX_PAIRS // len(keys))):
            allowed, k = None if whole else here.allowed(q, keys), keys
            if allowed is not None:
                seen = allowed.any(0)
                allowed, k = allowed[:, seen], keys[seen]
                if not len(k):
                    continue
                if bool(allowed.all()):
                    allowed = None
            texts = int((k >= first_text).sum())
            # text keys are cut off by their number, which must be equal in all groups of a batch
            kind = texts if texts in (0, geometry.text) else (len(batches), len(equal))
            if allowed is None:
                equal[merged, len(q), len(k), kind, b""].append((q, k))
                continue
            digest = hashlib.blake2b(allowed.numpy().tobytes(), digest_size=16).digest()
            if digest not in biases and free >= 4 * allowed.numel():
                free -= 4 * allowed.numel()
                biases[digest] = as_bias(allowed).to(device)
            if digest in biases:
                equal[merged, len(q), len(k), kind, digest].append((q, k))
            else:
                evaluate = _evaluation(here, q, k, device)
                batches.append(Batch(q[None].to(device), k[None].to(device), None, merged, evaluate))
    for (merged, *_, digest), members in equal.items():
        members.sort(key=lambda member: (int(member[0][0]), int(member[1][0])))
        q, k = (torch.stack(side).to(device) for side in zip(*members, strict=True))
        batches.append(Batch(q, k, biases.get(digest), merged))
    return sorted(batches, key=lambda batch: batch.merged)


def _evaluation(masks: _Masks, q: Tensor, k: Tensor, device: torch.device) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        allowed = masks.allowed(q, k)
        assert allowed is not None  # only masked problems are evaluated
        return as_bias(allowed).to(device)

    return evaluate


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

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self._lock = threading.Lock()

    def get(self, block_lists: BlockLists, geometry: Geometry, device: torch.device) -> list[Batch]:
        """The batches of these lists, built if they are new; their tensors are on `device`."""
        lists = block_lists[:4]
        key = (geometry, device, *(None if t is None else (t.shape, t.device) for t in lists))
        with self._lock:
            self.entries = [entry for entry in self.entries if not entry.owner.expired()]
            for entry in self.entries:
                if entry.key == key and all(map(_same, lists, entry.lists)):
                    self.entries.remove(entry)
                    self.entries.append(entry)
                    return entry.batches
            with torch.device("cpu"):  # whatever the caller's default device
                batches = build(BlockLists(*lists).to(torch.device("cpu")), geometry, device)
            copies = tuple(None if t is None else t.clone() for t in lists)
            self.entries.append(_Entry(key, copies, StorageWeakRef(block_lists.indices.untyped_storage()), batches))
            del self.entries[:-MAX_ENTRIES]
            return batches
