"""What is worked out once per plan: groups that hold every pair once, and a cache that is never stale."""

import functools
import gc

import pytest
import torch
from accuracy import plain_attention

import dit_accel
from dit_accel.kernels.block_sparse import portable
from dit_accel.kernels.block_sparse.grouping import group_rows
from dit_accel.kernels.block_sparse.prepare import MAX_ENTRIES


@pytest.fixture(autouse=True)
def _empty_cache():
    portable.preparations.entries.clear()
    yield
    portable.preparations.entries.clear()


def _prepared(problem):
    return portable.preparations.get(problem.block_lists(), problem.geometry(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("method", "config"),
    [("gna", {"window": (2, 3, 5)}), ("gna", {"window": (2, 4, 4), "stride": (2, 4, 4)}), ("radial", {"decay": 0.3})],
)
@pytest.mark.parametrize("tiles", [{}, {"tile_q": (2, 2, 4), "tile_k": (1, 4, 4)}], ids=["raster", "tiled"])
def test_batches_hold_every_allowed_pair_once(make_problem, method, config, tiles):
    problem = make_problem((4, 8, 9), method, config, text=5, **tiles)
    tokens = problem.q.shape[2]
    counts = torch.zeros(tokens, tokens, dtype=torch.int64)
    for batch in _prepared(problem):
        for q, k in zip(batch.q, batch.k, strict=True):
            bias = batch.evaluate() if batch.evaluate else batch.bias
            counts[q[:, None], k] += 1 if bias is None else bias.isfinite().long()
    assert torch.equal(counts, problem.mask()[0, 0].long())


@pytest.mark.parametrize("partial", ["None", "all", "per head"])
def test_tables_decide_visual_pairs_alone(make_problem, partial):
    """Blocks of text and conditioning that are marked as partial are attended whole."""
    problem = make_problem((2, 4, 5), "gna", {"window": (2, 3, 3)}, text=5, conditioning=3, dim=16)
    marks = {"None": None, "all": torch.ones_like(problem.lists[0], dtype=torch.bool)}
    if partial == "per head":
        problem.lists = tuple(x.expand(1, 2, *x.shape).contiguous() for x in problem.lists)
    problem.options = {**problem.options, "partial": marks.get(partial), "partial_blocks": problem.lists[0].numel()}
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    visual, mask = 40, torch.ones(48, 48, dtype=torch.bool)
    mask[:visual, :visual] = dit_accel.plan("gna", dit_accel.TokenGrid(2, 4, 5), window=(2, 3, 3)).token_mask()
    exact, _ = plain_attention(q, k, v, mask, problem.scale)
    for impl in ("reference", "portable"):
        torch.testing.assert_close(problem.call(impl, torch.float64), exact, rtol=1e-12, atol=1e-12)


def test_a_blocked_window_is_one_unmasked_batch(make_problem, monkeypatch):
    # At this size merging the windows would pay, too.
    monkeypatch.setattr("dit_accel.kernels.block_sparse.grouping.GROUP_COST", 0)
    monkeypatch.setattr("dit_accel.kernels.block_sparse.grouping.KEY_COST", 0)
    tiles = {"tile_q": (1, 2, 2), "tile_k": (1, 2, 2), "block_q": 4, "block_k": 4}
    blocked = {"window": (2, 4, 4), "stride": (2, 4, 4)}
    (batch,) = _prepared(make_problem((4, 8, 8), "gna", blocked, **tiles))
    assert batch.q.shape == batch.k.shape == (8, 32) and batch.bias is None and batch.evaluate is None


def test_groups_partition_the_rows():
    listed = torch.zeros(6, 6, dtype=torch.bool)
    listed[:3, :2] = listed[4, 3:] = listed[5, :1] = True
    groups = group_rows(listed, listed, torch.tensor([16, 16, 16, 16, 16, 0]), torch.full((6,), 16))
    assert sorted(block for group in groups for block in group.queries) == [0, 1, 2, 4]  # 3: no keys, 5: no tokens
    assert any({0, 1, 2} <= set(group.queries) for group in groups)


def test_dissimilar_large_rows_stay_apart():
    eye = torch.eye(4, dtype=torch.bool)
    groups = group_rows(eye, eye, torch.full((4,), 1024), torch.full((4,), 1024))
    assert sorted(group.queries for group in groups) == [[0], [1], [2], [3]]


def test_keys_that_many_queries_see_whole_are_a_group_without_mask():
    """Two frames of 8 blocks: each sees its own frame whole, and of the other a narrow band."""
    block = torch.arange(16)
    whole = block[:, None] // 8 == block // 8
    listed = whole | (block[:, None] % 8 == block % 8)
    groups = group_rows(listed, whole, torch.full((16,), 512), torch.full((16,), 512))
    first = [group for group in groups if not group.merged]
    assert sorted(group.queries for group in first) == [[*range(8)], [*range(8, 16)]]
    held = torch.zeros(16, 16, dtype=torch.int64)
    for group in groups:
        held[torch.tensor(group.queries)[:, None], group.keys.nonzero().squeeze(1)] += 1
    assert torch.equal(held, listed.long())


def test_second_call_prepares_nothing(make_problem, monkeypatch):
    problem = make_problem((2, 4, 5), "gna", {"window": (1, 3, 3)}, text=3)
    problem.run("portable", torch.float32)
    monkeypatch.setattr("dit_accel.kernels.block_sparse.prepare.build", None)
    problem.run("portable", torch.bfloat16)
    problem.options["text_len"] = torch.tensor([2], dtype=torch.int32)
    problem.run("portable", torch.float32)


def test_two_plans_in_turn(make_problem):
    first = make_problem((2, 4, 5), "gna", {"window": (1, 3, 3)})
    second = make_problem((2, 4, 5), "gna", {"window": (2, 1, 1)})
    for problem in (first, second, first, second):
        torch.testing.assert_close(problem.call("portable"), problem.call("reference"))
    assert len(portable.preparations.entries) == 2


def test_change_in_place(make_problem):
    problem = make_problem((2, 4, 5))
    before = problem.call("portable")
    problem.lists[1].fill_(1)
    after = problem.call("portable")
    torch.testing.assert_close(after, problem.call("reference"))
    assert not torch.equal(before, after)
    problem.lists[1].data.fill_(2)  # not seen by version counters
    torch.testing.assert_close(problem.call("portable"), problem.call("reference"))


def test_address_of_a_freed_list(make_problem):
    """A list at the address of one that was freed, of the same shape, gets its own result."""
    memory = bytearray(4 * 16)
    addresses = set()
    for count in (1, 3, 2):
        problem = make_problem((1, 8, 8))
        indices = torch.frombuffer(memory, dtype=torch.int32).view(4, 4)
        indices.copy_(torch.stack([torch.randperm(4) for _ in range(4)]))
        problem.lists = indices, torch.full((4,), count, dtype=torch.int32)
        addresses.add(indices.data_ptr())
        torch.testing.assert_close(problem.call("portable"), problem.call("reference"))
        del problem, indices
        gc.collect()
    assert len(addresses) == 1


def test_entries_go_with_their_lists_and_are_bounded(make_problem):
    problem = make_problem((2, 4, 5), "gna", {"window": (1, 3, 3)})
    problem.call("portable")
    assert len(portable.preparations.entries) == 1
    del problem
    gc.collect()
    problems = [make_problem((2, 4, 5), "gna", {"window": (1, 3, width)}) for width in (1, 2, 3, 4, 5)]
    problems += [make_problem((2, 4, 5), "gna", {"window": (2, 3, width)}) for width in (1, 2, 3, 4, 5)]
    for other in problems:
        other.call("portable")
    assert len(portable.preparations.entries) == MAX_ENTRIES


def test_inference_mode_tensors(make_problem):
    with torch.inference_mode():
        problem = make_problem((2, 4, 5), "gna", {"window": (1, 3, 3)})
        torch.testing.assert_close(problem.call("portable"), problem.call("reference"))


def test_text_lengths_share_one_preparation(make_problem):
    problem = make_problem((2, 4, 5), "gna", {"window": (1, 3, 3)}, text=6, text_lens=[6])
    for length in (6, 3, 0):
        problem.options["text_len"] = torch.tensor([length], dtype=torch.int32)
        torch.testing.assert_close(problem.call("portable"), problem.call("reference"))
    assert len(portable.preparations.entries) == 1


def test_the_callers_defaults_do_not_matter(make_problem, request):
    problem = make_problem((2, 4, 5), "gna", {"window": (1, 3, 3)})
    wanted = problem.call("portable")
    portable.preparations.entries.clear()
    request.addfinalizer(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        assert torch.equal(problem.call("portable"), wanted)
