"""`pack` and `dequantize`: exact values, exact bytes, invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.quantization import Quantizer, QuantizerSettings, quantize_rows, row_bytes
from qvla_jax.quantization.codes import CodeMap

from .weights import CHANNELS, FAN_INS, expected_rows, pack_codes, random_bits, random_weight

SLOW_COMPILES = settings(deadline=None, max_examples=8)


def on_grids(weight, bits, grid):
    """What the quantizer makes of the rows."""
    chosen = QuantizerSettings(grid=grid, rounding="nearest", bias_correction=False)
    return Quantizer(chosen).rows("any", jnp.asarray(weight), np.asarray(bits))


@SLOW_COMPILES
@given(CHANNELS, FAN_INS, st.integers(0, 99), st.sampled_from(["fitted", "rtn"]))
def test_dequantized_rows_are_those_of_the_grid(c, k, seed, grid):
    weight, bits = random_weight(c, k, seed), random_bits(c, seed)
    w = kernels.pack(weight, bits, grid=grid)
    expected = on_grids(weight, bits, grid)
    np.testing.assert_array_equal(kernels.dequantize(w), expected)
    np.testing.assert_array_equal(w.bits(), bits)


@pytest.mark.parametrize("grid", ["fitted", "rtn"])
@pytest.mark.parametrize(("k", "group"), [(64, 16), (75, 32), (40, 48), (129, 128)])
def test_groups_have_scales_of_their_own(grid, k, group):
    weight, bits = random_weight(7, k, seed=k), np.array([2, 3, 4, 8, 16, 0, 2])
    w = kernels.pack(weight, bits, group, grid=grid)
    # A row quantized alone may differ in the last bit of a scale: sums are taken in another order.
    np.testing.assert_allclose(
        kernels.dequantize(w), expected_rows(weight, bits, group, grid), rtol=1e-2, atol=1e-9
    )


@SLOW_COMPILES
@given(
    CHANNELS, FAN_INS, st.integers(0, 99), st.sampled_from([None, 16, 64]), st.booleans(),
    st.sampled_from([ml_dtypes.bfloat16, np.float32]),
)  # fmt: skip
def test_stored_bytes_are_those_of_the_account(c, k, seed, group, has_bias, dtype):
    weight, bits = random_weight(c, k, seed, dtype), random_bits(c, seed)
    size = np.dtype(dtype).itemsize
    bias = np.zeros(c, dtype) if has_bias else None
    w = kernels.pack(weight, bits, group, bias=bias, source_dtype=np.dtype(dtype).name)
    expected = [row_bytes(k, int(b), bias=has_bias, source_bytes=size, group=group) for b in bits]
    assert w.nbytes == sum(expected)


def test_a_uniform_weight_needs_no_index():
    weight = random_weight(5, 33, 0)
    w = kernels.pack(weight, np.full(5, 4), grid="rtn", index=False)
    assert w.nbytes == 5 * row_bytes(33, 4, bias=False, permuted=False)
    np.testing.assert_array_equal(kernels.dequantize(w), on_grids(weight, np.full(5, 4), "rtn"))
    with pytest.raises(InputError, match="one bit-width"):
        kernels.pack(weight, np.array([4, 4, 4, 4, 8]), index=False)


@pytest.mark.parametrize("bits", [0, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("k", [1, 3])
def test_a_single_row(bits, k):
    weight = random_weight(1, k, 3)
    w = kernels.pack(weight, np.array([bits]))
    expected = on_grids(weight, [bits], "fitted")
    np.testing.assert_array_equal(kernels.dequantize(w), expected)


def test_all_pruned_is_the_bias():
    bias = np.arange(4, dtype=np.float32)
    w = kernels.pack(random_weight(4, 9, 0), np.zeros(4, int), bias=bias)
    assert w.segments == ()
    assert w.nbytes == bias.nbytes
    assert not np.asarray(kernels.dequantize(w)).any()
    y = kernels.mixed_matmul(jnp.ones((2, 9)), w)
    np.testing.assert_array_equal(y, np.stack([bias, bias]))


def test_codes_and_scales_from_elsewhere():
    rng = np.random.default_rng(0)
    bits = np.array([2, 4, 16, 0, 4])
    codes = rng.integers(-8, 8, (5, 21)).astype(np.int8)
    codes[0] = rng.choice([-3, -1, 1, 3], 21)
    scales = rng.uniform(0.1, 1, (5, 2)).astype(ml_dtypes.bfloat16).astype(np.float32)
    weight = random_weight(5, 21, 1)
    w = pack_codes(weight, bits, codes, scales, 16)
    found = np.asarray(kernels.dequantize(w))
    spread = np.repeat(scales, 16, axis=1)[:, :21]
    for row in (0, 1, 4):
        np.testing.assert_array_equal(found[row], codes[row] * spread[row])
    np.testing.assert_array_equal(found[2], weight[2])
    assert not found[3].any()
    # And the quantizer's own codes, handed in, give what it packs by itself.
    q, s = quantize_rows(jnp.asarray(weight), 4, grid="fitted")
    again = pack_codes(weight, np.full(5, 4), q, s)
    same = jax.tree.map(np.array_equal, again, kernels.pack(weight, np.full(5, 4)))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros(3, np.float32)}, "expected rows"),
        ({"bits": np.array([4, 4])}, "expected 3 integers"),
        ({"bits": np.array([4, 5, 4])}, "row 1 has 5"),
        ({"group": 24}, "multiple of 16"),
        ({"bias": np.zeros(2, np.float32)}, "bias is"),
        ({"bits": np.full(3, 16), "source_dtype": "bfloat16"}, "does not hold them"),
        ({"bits": np.full(3, 16), "source_dtype": "int8"}, "choose from"),
        ({"weight": np.full((3, 8), np.nan, np.float32)}, "row 0 holds NaN"),
    ],
)
def test_bad_input_is_refused(change, message):
    given_ = {"weight": random_weight(3, 8, 0), "bits": np.full(3, 4), "group": None, **change}
    with pytest.raises(InputError, match=message):
        kernels.pack(**given_)


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (np.zeros((3, 7), np.int8), np.ones((3, 1)), "codes: expected"),
        (np.zeros((3, 8), np.int8), np.ones((3, 2)), "scales: expected"),
        (np.zeros((3, 8), np.int8), np.full((3, 1), 1.001), "exactly"),
        (np.zeros((3, 8), np.int8), -np.ones((3, 1)), "not positive"),
        (np.full((3, 8), 8, np.int8), np.ones((3, 1)), "holds 8"),
    ],
)
def test_rows_that_cannot_be_stored_are_refused(codes, scales, message):
    with pytest.raises(InputError, match=message):
        pack_codes(random_weight(3, 8, 0), np.full(3, 4), codes, scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"index": w.index[::-1].copy()}, "not in ascending order"),
        (lambda w: {"index": np.zeros_like(w.index)}, "names a channel twice"),
        (lambda w: {"index": w.index + np.uint16(1)}, "names channel 6 of 6"),
        (lambda w: {"index": None}, "no index"),
        (lambda w: {"segments": w.segments[::-1]}, "not in the order"),
        (lambda w: {"words": tuple(a[:, 1:] for a in w.words)}, "words are"),
        (lambda w: {"words": tuple(~a for a in w.words)}, "behind the last code"),
        (lambda w: {"scales": tuple(-a for a in w.scales)}, "not positive"),
        (lambda w: {"scales": w.scales[:1]}, "1 scales"),
        (lambda w: {"group": 8}, "no positive multiple"),
        (lambda w: {"source_dtype": "int8"}, "source dtype"),
        (lambda w: {"bias": np.full(6, np.inf, np.float32)}, "bias holds"),
        (
            lambda w: {
                "segments": tuple(
                    dataclasses.replace(s, code_map=CodeMap(3, 1)) for s in w.segments
                )
            },
            "codes stand for",
        ),
    ],
)
def test_broken_invariants_are_found(change, message):
    w = kernels.pack(random_weight(6, 9, 0), np.array([4, 2, 4, 2, 8, 8]))
    kernels.validate(w)
    with pytest.raises(InputError, match=rf"file.qvla: .*{message}"):
        kernels.validate(dataclasses.replace(w, **change(w)), where="file.qvla")


def test_a_packed_weight_is_a_pytree_with_static_metadata():
    w = kernels.pack(random_weight(6, 9, 0), np.array([4, 2, 4, 2, 8, 8]))
    leaves, structure = jax.tree.flatten(w)
    assert jax.tree.unflatten(structure, leaves).segments == w.segments
    found = jax.jit(kernels.dequantize)(w)
    np.testing.assert_array_equal(found, kernels.dequantize(w))
