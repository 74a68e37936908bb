"""Between the first order, which it starts from, and exact probing, where its budget goes."""

import dataclasses

import numpy as np
import pytest

from qvla_jax.errors import InputError
from qvla_jax.sensitivity import refined as module
from qvla_jax.sensitivity.accumulate import mean_over_frames
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.jacobian import frame_costs, layer_constants
from qvla_jax.sensitivity.refined import refined_costs

BITS = (0, 2, 4, 8)


@pytest.fixture(scope="module")
def exact(sweep):
    return exact_costs(sweep)[0]


def first_order(sweep):
    constants = layer_constants(sweep.layers, sweep.quantizer, BITS)
    return mean_over_frames(frame_costs(sweep, constants, probes="full"))[0]


def refined(sweep, **settings):
    return refined_costs(sweep, probes="full", **settings)[0]


def test_the_whole_budget_gives_exact_costs(sweep, exact):
    np.testing.assert_allclose(refined(sweep, share=1.0), exact, rtol=3e-3, atol=1e-10)


def test_a_linear_policy_needs_no_correction(linear_policy, sweep):
    linear = dataclasses.replace(sweep, policy=linear_policy)
    costs = refined(linear, share=0.2)
    np.testing.assert_allclose(costs, first_order(linear), rtol=2e-2, atol=1e-10)


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_the_budget_is_spent_and_kept(sweep, exact, monkeypatch, share):
    spent = 0

    def counting(of, *, rows):
        nonlocal spent
        spent += len(rows)
        return exact_costs(of, rows=rows)

    monkeypatch.setattr(module, "exact_costs", counting)
    costs = refined(sweep, share=share)
    assert 0.9 * share * exact.size <= spent <= share * exact.size
    known = exact > 0

    def off(values):
        return np.sqrt(np.mean(np.log(values[known] / exact[known]) ** 2))

    assert off(costs) < off(first_order(sweep))


def test_few_frames_serve_the_whole_set(sweep, exact):
    """Probed on two frames of five: closer to exact on all five than what those two alone say."""
    costs = refined(sweep, share=1.0, frames=2)
    part = module.FirstFrames(sweep.calibration, 2)
    two, _ = exact_costs(dataclasses.replace(sweep, calibration=part))
    known = exact > 0

    def off(values):
        return np.median(np.abs(np.log(values[known] / exact[known])))

    assert off(costs) < off(two) / 2


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_impossible_budgets_are_refused(sweep, share):
    with pytest.raises(InputError, match="share of exact"):
        refined(sweep, share=share)
