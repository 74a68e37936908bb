"""Drift and accumulated deviation, against values counted by hand."""

import numpy as np
import pytest

from qvla_jax.evaluation.drift import action_deviation, summarize_drift
from qvla_jax.evaluation.episodes import Episode, Result


def result(policy, state, heights, deviations=None, open_loop_steps=8):
    episode = Episode(
        policy_hash=policy, suite="s", task=0, initial_state=state, seed=0, max_steps=220,
        open_loop_steps=open_loop_steps, size=8, rendering="fast", simulator="none",
    )  # fmt: skip
    return Result(
        episode=episode,
        task_name="t",
        success=True,
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
    assert drift["seconds"] == pytest.approx([0.0, 0.4, 0.8, 1.2])
    assert drift["pairs"] == [2, 2, 1, 1]
    assert drift["distance_median"] == pytest.approx([0.0, 0.3, 0.2, 0.4])
    assert drift["distance_upper"][1] == pytest.approx(0.1 + 0.9 * 0.4)
    assert drift["deviation_episodes"] == 0
    assert drift["deviation_total"] is None


def test_deviations_accumulate_and_ended_episodes_keep_theirs():
    reference = [
        result("r", 0, [0.0] * 2, {"q": [1.0, 2.0], "z": [100.0, 100.0]}),
        result("r", 1, [0.0] * 3, {"q": [1.0, 0.0, 4.0]}),
        result("r", 2, [0.0] * 3),
    ]
    drift = summarize_drift([result("q", state, [0.0]) for state in range(3)], reference)
    assert drift is not None
    assert drift["deviation_mean"] == pytest.approx([1.0, 2.0, 4.0])
    assert drift["deviation_episodes"] == 2
    assert drift["deviation_total"] == pytest.approx(4.0)
    assert drift["deviation_standard_error"] == pytest.approx(np.std([3.0, 5.0], ddof=1) / 2**0.5)


def test_nothing_in_common_is_none():
    assert summarize_drift([result("q", 0, [])], [result("r", 0, [])]) is None
    assert summarize_drift([result("q", 1, [0.0])], [result("r", 0, [0.0])]) is None
    other = result("q", 0, [0.0], open_loop_steps=4)
    assert summarize_drift([other], [result("r", 0, [0.0])]) is None


def test_only_executed_actions_deviate():
    first, second = np.zeros((4, 2)), np.ones((4, 2))
    assert action_deviation(first, second, executed=3) == 6.0
