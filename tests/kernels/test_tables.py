"""Tables of packed rows: lookups are exactly codes times scale."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from qvla_jax import kernels
from qvla_jax.errors import InputError


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(0).normal(size=(1030, 9)).astype(ml_dtypes.bfloat16)


def test_a_lookup_is_codes_times_scale(table):
    packed = kernels.pack_table(table, 8)
    rows = table.astype(np.float32)
    scale = (np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)).astype(ml_dtypes.bfloat16)
    scale = scale.astype(np.float32)
    codes = np.clip(np.round(rows / scale), -128, 127)
    # Across the border of a block, in any order, repeated.
    ids = np.array([1029, 0, 1023, 1024, 0])
    found = np.asarray(kernels.table_rows(packed, ids))
    np.testing.assert_array_equal(found, (codes * scale)[ids])
    assert np.abs(found - rows[ids]).max() <= 0.5 * scale[ids].max()
    np.testing.assert_array_equal(np.asarray(kernels.dequantize(packed)), codes * scale)


def test_a_row_takes_its_codes_and_a_scale(table):
    packed = kernels.pack_table(table, 8)
    kernels.validate(packed)
    assert packed.nbytes == 1030 * (3 * 4 + 2)  # 9 bytes in whole words, and a bfloat16


def test_what_is_no_table_is_refused(table):
    mixed = kernels.pack(table, np.resize([8, 4], len(table)))
    with pytest.raises(InputError, match=r"of \[8, 4\] bits with an index: lookups take rows of"):
        kernels.check_table(mixed)
    with pytest.raises(InputError, match="no grid has 16 bits"):
        kernels.pack_table(table, 16)
    packed = kernels.pack_table(table, 8)
    biased = dataclasses.replace(packed, bias=np.zeros(len(table), np.float32))
    with pytest.raises(InputError, match="with a bias"):
        kernels.check_table(biased)
