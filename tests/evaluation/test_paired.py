"""Intervals and tests against published values, formulas written out, and enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax.errors import InputError
from qvla_jax.evaluation.paired import (
    Comparison,
    Success,
    compare,
    mcnemar_exact,
    newcombe_interval,
    wilson_interval,
)

COUNTS = st.integers(0, 30)


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_solves_its_quadratic(successes, episodes):
    successes = min(successes, episodes)
    z, p = 1.959963984540054, successes / episodes
    for bound in wilson_interval(successes, episodes):
        # The bounds are the proportions whose score statistic is exactly z.
        assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / episodes, abs=1e-9)


def test_wilson_of_no_failure_is_not_certain():
    low, high = Success(10, 10).interval_95
    assert (low, high) == (pytest.approx(10 / (10 + 1.959963984540054**2)), 1.0)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(successes, episodes):
    with pytest.raises(InputError, match="no success rate"):
        wilson_interval(successes, episodes)


def test_newcombe_published_example():
    # Newcombe (1998), table of examples: 36 of both, 12 and 2 of one, 0 of neither.
    low, high = newcombe_interval(Comparison(36, 12, 2, 0))
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_newcombe_holds_the_difference_and_mirrors(a, b, c, d):
    if a + b + c + d == 0:
        return
    counts, swapped = Comparison(a, b, c, d), Comparison(a, c, b, d)
    low, high = counts.interval_95
    assert -1 <= low <= counts.difference <= high <= 1
    assert swapped.interval_95 == pytest.approx((-high, -low))
    assert swapped.mcnemar_exact_p == pytest.approx(counts.mcnemar_exact_p)


@pytest.mark.parametrize("shares", [(0.6, 0.15, 0.05, 0.2), (0.3, 0.2, 0.2, 0.3)])
def test_newcombe_covers_as_often_as_it_says(shares):
    n, covered, total = 20, 0.0, 0.0
    truth = shares[1] - shares[2]
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        d = n - a - b - c
        if d < 0:
            continue
        counts = (a, b, c, d)
        log = math.lgamma(n + 1) + sum(
            k * math.log(p) - math.lgamma(k + 1) for k, p in zip(counts, shares, strict=True)
        )
        if log < -18:  # Adds up to less than 1e-4.
            continue
        low, high = newcombe_interval(Comparison(*counts))
        total += math.exp(log)
        covered += math.exp(log) * (low <= truth <= high)
    assert total == pytest.approx(1, abs=1e-4)
    assert 0.93 < covered < 0.985


@given(COUNTS, COUNTS)
def test_mcnemar_sums_the_binomial_tail(b, c):
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail))


def test_pairs_are_matched_by_episode():
    rng = np.random.default_rng(0)
    keys = [(task, state) for task in range(5) for state in range(8)]
    one = {key: bool(rng.integers(2)) for key in keys}
    two = {key: bool(rng.integers(2)) for key in reversed(keys[4:])}
    result = compare(one, two)
    assert result.episodes == 36
    assert result.candidate_only == sum(one[k] and not two[k] for k in keys[4:])
    assert result.reference_only == sum(two[k] and not one[k] for k in keys[4:])
    assert result.both == sum(two[k] and one[k] for k in keys[4:])
    assert result.difference == pytest.approx(
        (sum(one[k] for k in keys[4:]) - sum(two.values())) / 36
    )
    with pytest.raises(InputError, match="no episode in common"):
        compare({(0, 0): True}, {(0, 1): True})
