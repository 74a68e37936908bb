"""The ternary and the binary rival against plain loops."""

import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax.methods.bitvla import absmean_ternary
from qvla_jax.methods.hbvla import binarized, haar, hbvla, pairs

ROWS = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 3), st.integers(2, 7)), elements=st.floats(-4, 4, width=16)
)


def test_ternary_codes_are_those_of_the_published_formula():
    weight = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    rows = absmean_ternary(jnp.asarray(weight))
    scale = sum(abs(w) for w in weight.reshape(-1).tolist()) / weight.size
    expected = [[max(-1, min(1, round(w / scale))) for w in row] for row in weight.tolist()]
    np.testing.assert_array_equal(rows.codes, expected)
    np.testing.assert_array_equal(rows.scales, np.full((5, 1), ml_dtypes.bfloat16(scale)))
    assert (rows.bits == 2).all()


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_no_split_into_two_groups_is_better(rows):
    found = np.sum((binarized(rows) - rows) ** 2, axis=1)
    for row, error in zip(rows, found, strict=True):
        size = np.abs(row - row.mean())
        errors = []
        for bound in size:
            groups = [size[size <= bound], size[size > bound]]
            errors.append(sum(np.sum((g - g.mean()) ** 2) for g in groups if len(g)))
        np.testing.assert_allclose(error, min(errors), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_pairs_are_the_closest_that_are_left(columns):
    columns = columns[:, : columns.shape[1] // 2 * 2]
    left = set(range(columns.shape[1]))
    for a, b in pairs(columns):
        assert {a, b} <= left
        distances = {
            (i, j): np.sum((columns[:, i] - columns[:, j]) ** 2)
            for i in left
            for j in left
            if i < j
        }
        assert distances[a, b] <= min(distances.values()) + 1e-9
        left -= {a, b}
    assert not left


def test_the_haar_transform_is_its_own_inverse():
    values = np.random.default_rng(0).normal(size=(2, 3, 5))
    np.testing.assert_allclose(haar(haar(values)), values)
    np.testing.assert_allclose(np.sum(haar(values) ** 2), np.sum(values**2))


def test_binarized_weights_are_few_numbers_and_salient_ones_are_closest():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(9, 50))
    weight[:, 7] *= 3
    x = rng.normal(size=(400, 50))
    x[:, [7, 11]] *= 10
    found = hbvla(weight, x.T @ x / 400)
    error = np.sum((found.values - weight) ** 2, axis=0) / np.sum(weight**2, axis=0)
    salient = np.argsort(error)[:4]  # 8 % of 50
    assert {7, 11} <= set(salient)
    assert found.code_bits == 9 * 54
    # Of 46 columns each row has two bands of at most four numbers; their sums and differences.
    others = np.delete(found.values, salient, axis=1)
    assert max(len(np.unique(np.round(row, 9))) for row in others) <= 32
    assert found.all_bits > 2 * found.code_bits


def test_a_layer_that_no_action_depends_on_is_binarized_too():
    weight = np.random.default_rng(0).normal(size=(4, 16))
    found = hbvla(weight, np.zeros((16, 16)))
    assert np.isfinite(found.values).all()
    assert np.sum((found.values - weight) ** 2) < 0.5 * np.sum(weight**2)
