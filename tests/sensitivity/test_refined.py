"""Between the first order, which it starts from, and exact probing, where its budget goes."""

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
def exact(policy, frames, layers, index, quantizer):
    return exact_costs(policy, frames, layers, index, quantizer, bits=BITS, batch=4)[0]


@pytest.fixture(scope="module")
def first_order(policy, frames, layers, index, quantizer):
    constants = layer_constants(layers, quantizer, BITS)
    return mean_over_frames(frame_costs(policy, frames, index, constants, probes="full", batch=4))[
        0
    ]


def refined(policy, calibration, layers, index, quantizer, **settings):
    return refined_costs(
        policy, calibration, layers, index, quantizer, bits=BITS, probes="full", batch=4, **settings
    )[0]


def test_the_whole_budget_gives_exact_costs(policy, frames, layers, index, quantizer, exact):
    costs = refined(policy, frames, layers, index, quantizer, share=1.0)
    np.testing.assert_allclose(costs, exact, rtol=3e-3, atol=1e-10)


def test_a_linear_policy_needs_no_correction(linear_policy, frames, layers, index, quantizer):
    costs = refined(linear_policy, frames, layers, index, quantizer, share=0.2)
    constants = layer_constants(layers, quantizer, BITS)
    expected, _ = mean_over_frames(
        frame_costs(linear_policy, frames, index, constants, probes="full", batch=4)
    )
    np.testing.assert_allclose(costs, expected, rtol=2e-2, atol=1e-10)


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_the_budget_is_spent_and_kept(
    policy, frames, layers, index, quantizer, exact, first_order, monkeypatch, share
):
    spent = 0

    def counting(*arguments, rows, **settings):
        nonlocal spent
        spent += len(rows)
        return exact_costs(*arguments, rows=rows, **settings)

    monkeypatch.setattr(module, "exact_costs", counting)
    costs = refined(policy, frames, layers, index, quantizer, share=share)
    assert 0.9 * share * exact.size <= spent <= share * exact.size
    known = exact > 0

    def off(values):
        return np.sqrt(np.mean(np.log(values[known] / exact[known]) ** 2))

    assert off(costs) < off(first_order)


def test_few_frames_serve_the_whole_set(policy, frames, layers, index, quantizer, exact):
    """Probed on two frames of five: closer to exact on all five than what those two alone say."""
    costs = refined(policy, frames, layers, index, quantizer, share=1.0, frames=2)
    part = module.FirstFrames(frames, 2)
    two, _ = exact_costs(policy, part, layers, index, quantizer, bits=BITS, batch=4)
    known = exact > 0

    def off(values):
        return np.median(np.abs(np.log(values[known] / exact[known])))

    assert off(costs) < off(two) / 2


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_impossible_budgets_are_refused(policy, frames, layers, index, quantizer, share):
    with pytest.raises(InputError, match="share of exact"):
        refined(policy, frames, layers, index, quantizer, share=share)
