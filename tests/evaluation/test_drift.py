"""Drift and accumulated deviation, against values counted by hand."""

import numpy as np
import pytest

from qvla_jax.evaluation.drift import FailurePrediction, action_deviation, summarize_drift
from qvla_jax.evaluation.episodes import Episode, Result


def result(policy, state, heights, deviations=None, open_loop_steps=8, success=True):
    episode = Episode(
        policy_hash=policy, suite="s", task=0, initial_state=state, seed=0, max_steps=220,
        open_loop_steps=open_loop_steps, size=8, rendering="fast", simulator="none",
    )  # fmt: skip
    return Result(
        episode=episode,
        task_name="t",
        success=success,
        steps=8 * len(heights),
        seconds=1.0,
        positions=[(0.0, 0.0, height) for height in heights],
        deviations=deviations or {},
    )


def test_distances_count_while_both_run():
    reference = [result("r", 0, [0.0, 1.0, 2.0]), result("r", 1, [0.0, 0.0, 0.0, 0.0])]
    candidate = [result("q", 0, [0.0, 1.5]), result("q", 1, [0.0, 0.1, 0.2, 0.4, 9.0])]
    drift = summarize_drift(candidate, reference)
    assert drift is not None
    assert drift.seconds == pytest.approx([0.0, 0.4, 0.8, 1.2])
    assert drift.pairs == (2, 2, 1, 1)
    assert drift.distance_median == pytest.approx([0.0, 0.3, 0.2, 0.4])
    assert drift.distance_upper[1] == pytest.approx(0.1 + 0.9 * 0.4)
    assert drift.deviation_episodes == 0
    assert drift.deviation_total is None


def test_deviations_accumulate_and_ended_episodes_keep_theirs():
    reference = [
        result("r", 0, [0.0] * 2, {"q": [1.0, 2.0], "z": [100.0, 100.0]}),
        result("r", 1, [0.0] * 3, {"q": [1.0, 0.0, 4.0]}),
        result("r", 2, [0.0] * 3),
    ]
    drift = summarize_drift([result("q", state, [0.0]) for state in range(3)], reference)
    assert drift is not None
    assert drift.deviation_mean == pytest.approx([1.0, 2.0, 4.0])
    assert drift.deviation_episodes == 2
    assert drift.deviation_total == pytest.approx(4.0)
    assert drift.deviation_standard_error == pytest.approx(np.std([3.0, 5.0], ddof=1) / 2**0.5)


def test_what_tells_failures_is_counted_over_pairs_of_episodes():
    totals, lengths, solved = [5.0, 1.0, 3.0, 2.0, 9.0], [4, 2, 2, 2, 9], [0, 1, 0, 1, 0]
    reference = [
        # The reference itself fails the last one.
        result("r", state, [0.0] * lengths[state], {"q": [totals[state]]}, success=state < 4)
        for state in range(5)
    ]
    candidate = [result("q", s, [0.0], success=bool(solved[s])) for s in range(5)]
    drift = summarize_drift(candidate, reference)
    assert drift is not None
    # 5 and 3 lie above both 1 and 2; lengths 4 and 2 above, and level with, both of 2.
    assert drift.tells_failures == FailurePrediction(deviation=1.0, steps=0.75)
    everything = summarize_drift([result("q", s, [0.0]) for s in range(4)], reference)
    assert everything is not None
    assert everything.tells_failures is None


def test_nothing_in_common_is_none():
    assert summarize_drift([result("q", 0, [])], [result("r", 0, [])]) is None
    assert summarize_drift([result("q", 1, [0.0])], [result("r", 0, [0.0])]) is None
    other = result("q", 0, [0.0], open_loop_steps=4)
    assert summarize_drift([other], [result("r", 0, [0.0])]) is None


def test_only_executed_actions_deviate():
    first, second = np.zeros((4, 2)), np.ones((4, 2))
    assert action_deviation(first, second, executed=3) == 6.0
