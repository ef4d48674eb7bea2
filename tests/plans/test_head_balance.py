"""Heads given to GPUs by their weights: equally many each, no worse than the bound of the rule, alike on all GPUs."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.plans.head_balance import by_weight, imbalance, in_order, over_steps

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=7)


@given(WEIGHTS, st.integers(1, 4))
def test_every_head_is_given_once_and_each_gpu_has_its_number(weights, gpus):
    balanced, plain = by_weight(weights, gpus), in_order(len(weights), gpus)
    assert sorted(itertools.chain(*balanced)) == list(itertools.chain(*plain)) == list(range(len(weights)))
    assert [len(heads) for heads in balanced] == [len(heads) for heads in plain]


@given(st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
def test_it_is_near_the_best_of_all_assignments(weights):
    """Of two GPUs: at most the lightest possible busiest one and half of the heaviest head."""
    halves = (set(half) for half in itertools.combinations(range(6), 3))
    best = min(max(sum(weights[i] for i in half), sum(weights) - sum(weights[i] for i in half)) for half in halves)
    busiest = max(sum(weights[head] for head in heads) for heads in by_weight(weights, 2))
    assert busiest <= best + max(weights) / 2 + 1e-9


def test_by_hand():
    weights = [4.0, 3.0, 2.0, 1.0]
    assert in_order(4, 2) == ((0, 1), (2, 3)) and imbalance(weights, in_order(4, 2)) == pytest.approx(1.4)
    assert by_weight(weights, 2) == ((0, 3), (1, 2)) and imbalance(weights, by_weight(weights, 2)) == 1.0
    assert by_weight([1.0] * 5, 2) == ((0, 3, 4), (1, 2))
    # the second step is given by the first one's weights: heads 0 and 3 have 2 + 2 of 10
    assert over_steps([weights, [2.0, 3.0, 3.0, 2.0]], 2) == (1.0, pytest.approx(1.2))
