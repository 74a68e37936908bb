"""The one signature, and validation against exact probing."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from qvla_jax.allocation import allocate
from qvla_jax.errors import InputError
from qvla_jax.inference.quantize import quantize
from qvla_jax.models import get_module
from qvla_jax.plain import to_plain
from qvla_jax.sensitivity import ESTIMATORS, joint_error, sensitivities, spearman, validate
from qvla_jax.sensitivity.batches import FirstFrames
from qvla_jax.sensitivity.joint import alternate
from qvla_jax.sensitivity.validation import sample_channels

from .toys import LLM, ToyFrames, toy_policy

BITS = (0, 2, 4, 8, 16)
# Of three allocations, the second of which has the most bits.
_SHARES = ((0.3, 0.3, 0.4, 0, 0), (0, 0, 0.2, 0.4, 0.4), (0, 1, 0, 0, 0))


@pytest.fixture(scope="module")
def table(policy, frames):
    return sensitivities(policy, frames, probes="full", batch=4)


@pytest.mark.parametrize("method", ESTIMATORS)
def test_every_method_fills_the_same_table(policy, frames, index, method):
    seen = []
    table = sensitivities(
        policy, frames, method=method, probes=2, batch=4,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )  # fmt: skip
    assert table.index == index
    assert table.bits == BITS
    assert table.costs.shape == table.sizes.shape == (len(index), 5)
    assert not table.costs[:, 4].any()
    assert (table.costs[:, 0] > 0).any()
    # More bits, less error, summed over all channels.
    assert (np.diff(table.costs.sum(axis=0)) < 0).all()
    assert table.method == method
    assert table.provenance["policy"] == policy.fingerprint
    assert table.provenance["calibration"] == frames.manifest["sha256"]
    json.dumps(table.provenance, allow_nan=False)
    assert seen[-1][1] == seen[-1][2]


def test_options_keep_their_order(policy, frames, table):
    other = sensitivities(policy, frames, probes="full", bits=(16, 4, 0), batch=4)
    np.testing.assert_allclose(other.costs, table.costs[:, [4, 2, 0]], rtol=1e-5)
    np.testing.assert_array_equal(other.sizes, table.sizes[:, [4, 2, 0]])


def test_joint_factors_are_at_least_one_and_not_for_the_proxy(policy, frames, table):
    assert len(table.joint) == 5
    assert min(table.joint) >= 1
    assert table.joint[4] == 1
    proxy = sensitivities(policy, frames, method="input_hessian", batch=4)
    assert proxy.joint is None


def test_joint_factors_weigh_action_dimensions_as_costs_do(policy, frames, table):
    weights = np.full(3, 1 / 4)
    weighed = sensitivities(policy, frames, probes="full", action_weights=weights, batch=4)
    np.testing.assert_allclose(weighed.costs, table.costs / 4, rtol=1e-4)
    assert max(table.joint) > 1
    np.testing.assert_allclose(weighed.joint, table.joint, rtol=1e-4)


def test_costs_of_the_executed_steps_are_those_of_quantized_channels(policy, frames, index):
    steps = policy.config.action_horizon - 1
    made = {
        method: sensitivities(
            policy, frames, method=method, bits=(4,), probes="full", executed_steps=steps, batch=4,
            joint=method == "exact",
        )
        for method in ("exact", "jacobian")
    }  # fmt: skip
    exact = made["exact"]
    assert exact.executed_steps == steps
    assert made["jacobian"].provenance["settings"]["executed_steps"] == steps

    def measured(bits):
        changed = quantize(policy, bits, quantizer=exact.quantizer, packed=False)
        (batch,) = frames.batches(frames.frames)
        change = changed.infer_normalized(batch) - policy.infer_normalized(batch)
        return np.mean(np.sum(change[:, :steps].astype(np.float64) ** 2, axis=(1, 2)))

    for row in range(0, len(index), len(index) // 12):
        bits = np.full(len(index), 16)
        bits[row] = 4
        np.testing.assert_allclose(exact.costs[row, 0], measured(bits), rtol=1e-3, atol=1e-12)
    together = measured(np.full(len(index), 4)) / exact.costs.sum()
    np.testing.assert_allclose(exact.joint, max(together, 1), rtol=1e-3)
    assert spearman(made["jacobian"].costs[:, 0], exact.costs[:, 0]) > 0.97
    assert sensitivities(
        policy, frames, probes=1, executed_steps=steps + 1, joint=False
    ).executed_steps is None  # fmt: skip


def test_alternation_takes_the_allocation_with_the_smallest_measured_error(policy, frames, table):
    rng = np.random.default_rng(0)
    offers = [rng.choice(BITS, len(table.index), p=p) for p in _SHARES]
    tables = []

    def allocate(of):
        tables.append(of)
        return offers[len(tables) - 1]

    best = alternate(policy, frames, table, allocate, rounds=2)

    def measured(bits):
        changed = quantize(policy, bits, quantizer=table.quantizer, packed=False)
        return joint_error(policy, changed, frames)

    errors = [measured(bits) for bits in offers]
    assert np.argmin(errors) == 1
    np.testing.assert_array_equal(best, offers[1])

    assert tables[0] is table
    for bits, of in zip(offers, tables[1:], strict=False):
        for b, factor in zip(BITS, of.joint, strict=True):
            only = np.where(bits == b, b, 16)
            sum_of_costs = table.costs[bits == b, BITS.index(b)].sum()
            if b == 16 or not sum_of_costs:
                assert factor == 1
                continue
            np.testing.assert_allclose(factor, max(measured(only) / sum_of_costs, 1), rtol=1e-5)
    assert max(tables[1].joint) > 1


def test_the_walk_from_table_to_quantized_policy(policy, frames, table):
    allocation = allocate(table, budget_bits=12.0)
    quantized = quantize(policy, allocation, packed=False)
    assert quantized.quantization["quantizer"]["bias_correction"]
    measured, predicted = joint_error(policy, quantized, frames), table.predicted(allocation.bits)
    assert 0.25 < measured / predicted < 4


def test_validation_ranks_like_exact(policy, frames, table):
    result = validate(policy, frames, table, channels=30, frames=5)
    json.dumps(to_plain(result), allow_nan=False)
    assert result.channels == 30
    assert result.frames == 5
    assert [row.bits for row in result.spearman] == [0, 2, 4, 8]
    # The table has these very frames and all probes, so both comparisons are the same.
    assert result.spearman_table == result.spearman
    # A toy of width 12 is strongly curved: pruning a channel is far from first order.
    for row, least in zip(result.spearman, (0.5, 0.8, 0.98, 0.99), strict=True):
        assert row.spearman > least


def test_a_table_of_other_layers_is_not_validated(frames, table):
    class Other(type(toy_policy().model)):
        def __init__(self):
            super().__init__(linear=False, seed=0)
            self.vision_backbone.featurizer.blocks = nnx.List(
                [self.vision_backbone.featurizer.blocks[0]]
            )

    with pytest.raises(InputError, match="other layers"):
        validate(toy_policy().replace(model=Other()), frames, table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hessian"}, "unknown estimator 'hessian'"),
        ({"bits": (0, 5)}, "distinct options"),
        ({"bits": (4, 4)}, "distinct options"),
        ({"bits": (16,)}, "distinct options"),
        ({"probes": 0}, "probes"),
        ({"action_weights": np.ones(2)}, "expected 3 finite numbers"),
        ({"action_weights": np.array([1.0, -1, 1])}, "none negative"),
        ({"executed_steps": 0}, "executed_steps: expected a whole number from 1 to"),
    ],
)
def test_bad_arguments_are_refused(policy, frames, arguments, message):
    with pytest.raises(InputError, match=message):
        sensitivities(policy, frames, **arguments)


def test_nan_weights_name_layer_and_channel(frames):
    policy = toy_policy()
    linear = get_module(policy.model, LLM)
    linear.kernel = nnx.Param(linear.kernel[...].at[0, 5].set(jnp.nan))
    with pytest.raises(InputError, match=rf"{LLM}.*channel 5 hold NaN"):
        sensitivities(policy, frames)


def test_an_empty_calibration_set_is_refused(policy):
    with pytest.raises(InputError, match="no frames"):
        sensitivities(policy, ToyFrames(0))


def test_first_frames_are_the_first_frames():
    whole = ToyFrames(7)
    part = FirstFrames(whole, 5)
    found = np.concatenate([batch["image"] for batch in part.batches(2)])
    np.testing.assert_array_equal(found, whole.arrays["image"][:5])


def test_samples_are_distinct_and_repeatable(index):
    first = sample_channels(index, 9, seed=1)
    assert len(set(first.tolist())) == 9
    np.testing.assert_array_equal(first, sample_channels(index, 9, seed=1))
    np.testing.assert_array_equal(sample_channels(index, 10**6, seed=0), np.arange(len(index)))
    with pytest.raises(InputError):
        sample_channels(index, 0, seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_spearman_equals_scipy_ties_included(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)


def test_spearman_without_variation_is_nan():
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
