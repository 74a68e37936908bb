"""Error feedback against its definition in float64, and against exhaustive search."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qvla_jax.quantization import InputStatistics, Quantizer, QuantizerSettings
from qvla_jax.quantization.codes import levels
from qvla_jax.quantization.feedback import feedback_factor, feedback_rows
from qvla_jax.quantization.grid import quantize_rows


def covariance(k, seed=0, rank=None):
    mixing = np.random.default_rng(seed + 1).normal(size=(k, k))
    x = np.random.default_rng(seed).normal(size=(rank or 4 * k, k)) @ mixing
    return x.T @ x / len(x)


def by_definition(row, scale, code_levels, matrix, damping):
    """The update of GPTQ (arXiv 2210.17323, equations 2 and 3), one input after another."""
    low, high, step, offset = code_levels
    level = np.mean(np.diagonal(matrix))
    order = np.argsort(-np.diagonal(matrix), kind="stable")
    left = list(order)
    w = row.astype(np.float64).copy()
    result = np.zeros_like(w)
    while left:
        inverse = np.linalg.inv(matrix[np.ix_(left, left)] + damping * level * np.eye(len(left)))
        j = left[0]
        code = np.clip(step * np.round((w[j] / scale - offset) / step) + offset, low, high)
        result[j] = scale * code
        w[left] -= (w[j] - result[j]) / inverse[0, 0] * inverse[0]
        left.pop(0)
    return result


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_feedback_is_that_of_its_definition(bits, k):
    weight = np.random.default_rng(bits).normal(size=(5, k)).astype(np.float32)
    matrix = covariance(k)
    _, scale = quantize_rows(jnp.asarray(weight), bits, grid="fitted")
    code_levels = np.repeat(np.float32(levels(bits, "fitted"))[:, None], 5, axis=1)
    order, factor = feedback_factor(matrix, 0.01)
    # Blocks that do not divide k, so that updates cross them and the last one is padded.
    found = feedback_rows(jnp.asarray(weight), scale, jnp.asarray(code_levels), order, factor,
                          block=16)  # fmt: skip
    expected = [
        by_definition(row, float(s), levels(bits, "fitted"), matrix, 0.01)
        for row, s in zip(weight, np.asarray(scale)[:, 0], strict=True)
    ]
    found = np.asarray(found) * np.asarray(scale)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_feedback_lies_between_nearest_and_the_best_of_all_roundings():
    k, bits = 5, 2
    matrix = covariance(k)
    weight = np.random.default_rng(3).normal(size=(40, k)).astype(np.float32)
    statistics = InputStatistics({"l": np.zeros(k)}, {"l": matrix})
    fed, nearest = (
        np.asarray(
            Quantizer(QuantizerSettings(rounding=rounding), statistics).rows(
                "l", jnp.asarray(weight), np.full(40, bits)
            ),
            np.float64,
        )
        for rounding in ("feedback", "nearest")
    )
    scale = np.asarray(quantize_rows(jnp.asarray(weight), bits, grid="fitted")[1])
    codes = np.asarray(list(itertools.product((-3, -1, 1, 3), repeat=k)))

    def error(rows, source):
        change = rows - source
        return np.einsum("...j,jk,...k->...", change, matrix, change)

    best = np.asarray([error(s * codes, row).min() for s, row in zip(scale, weight, strict=True)])
    assert (error(fed, weight) >= best - 1e-6).all()
    assert error(fed, weight).mean() < 0.9 * error(nearest, weight).mean()


def test_without_variance_rows_are_rounded_to_nearest():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    statistics = InputStatistics({"l": np.zeros(9)}, {"l": np.zeros((9, 9))})
    fed, nearest = (
        Quantizer(QuantizerSettings(rounding=rounding), statistics).rows("l", weight, np.full(3, 4))
        for rounding in ("feedback", "nearest")
    )
    np.testing.assert_allclose(fed, nearest, rtol=1e-6)


def test_fewer_frames_than_inputs_still_give_finite_rows():
    k = 30
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, k)), jnp.float32)
    matrix = covariance(k, rank=3)
    statistics = InputStatistics({"l": np.zeros(k)}, {"l": matrix})
    rows = Quantizer(QuantizerSettings(), statistics).rows("l", weight, np.array([0, 2, 4, 16]))
    assert np.isfinite(rows).all()
    assert not rows[0].any()
    np.testing.assert_array_equal(rows[3], weight[3])


def test_what_rounding_leaves_of_a_small_covariance_is_no_failure():
    """Pictures of one grey value: the means of inputs are thousands of their deviations."""
    rng = np.random.default_rng(0)
    exact = covariance(12, rank=3)
    noise = rng.normal(size=(12, 12)) * 0.3 * np.mean(np.diagonal(exact))
    rounded = exact + (noise + noise.T) / 2
    assert np.linalg.eigvalsh(rounded)[0] < -0.1 * np.mean(np.diagonal(exact))
    _, factor = feedback_factor(rounded, 0.01)
    order = np.argsort(-np.diagonal(rounded), kind="stable")
    values, axes = np.linalg.eigh(rounded[np.ix_(order, order)] / np.mean(np.diagonal(rounded)))
    kept = np.maximum(values + 0.01, 0.01)
    np.testing.assert_allclose(factor.T @ factor, (axes / kept) @ axes.T, rtol=1e-3, atol=1e-3)
