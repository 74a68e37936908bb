"""The TPU kernel where it is special: interpreted with races and unwritten memory looked for."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params

from qvla_jax import kernels
from qvla_jax.kernels import pallas_tpu, tiles, tpu_weight
from qvla_jax.kernels.packed import Segment

from .weights import pack_codes, random_weight

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def make(widths, c, k, group=None, grid="fitted", pruned=False):
    """Rows of several widths in turn, with any codes."""
    rng = np.random.default_rng(0)
    bits = np.resize(widths, c)
    if pruned:
        bits[5:9] = 0
    codes = rng.integers(-2, 2, (c, k))
    codes = 2 * codes + 1 if grid == "fitted" else codes
    scales = 2.0 ** rng.integers(-8, -4, (c, 1 if group is None else -(-k // group)))
    source = random_weight(c, k, 0, ml_dtypes.bfloat16)
    bias = rng.normal(size=c).astype(np.float32)
    return pack_codes(
        source, bits, codes, scales.astype(np.float32), group, grid, bias=bias,
        source_dtype="bfloat16",
    )  # fmt: skip


def check(w, x, activation_bits):
    found = kernels.mixed_matmul(x, w, activation_bits, "pallas_tpu")
    expected = kernels.mixed_matmul(x, w, activation_bits, "reference")
    found, expected = (np.asarray(y, np.float32) for y in (found, expected))
    lengths = np.linalg.norm(np.asarray(x, np.float64), axis=1)[:, None]
    allowed = 2e-6 * lengths * np.linalg.norm(kernels.dequantize(w), axis=1) + 1e-6
    if x.dtype == jnp.bfloat16:  # both were rounded
        allowed = allowed + np.abs(expected) * 2.0**-7
    assert (np.abs(found - expected) <= allowed).all()


def inputs(rows, k, dtype=jnp.bfloat16, mean=0.0):
    x = np.random.default_rng(1).normal(mean, size=(rows, k))
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


# Digits, bfloat16 and int8; whole rows, groups, and groups finer than vectors. A mean that is far
# from zero would show whatever cancels.
@pytest.mark.parametrize(
    ("widths", "group", "rows", "dtype", "activation_bits"),
    [
        ((16, 8, 4, 2), None, 3, jnp.float32, 16),
        ((16, 8, 4, 2), None, 3, jnp.bfloat16, 8),
        ((16, 2), None, 70, jnp.bfloat16, 16),  # in two blocks of rows
        ((4,), 128, 9, jnp.float32, 16),
        ((4,), 128, 33, jnp.float32, 8),
        ((4, 2), 48, 33, jnp.float32, 16),
        ((2,), None, 1, jnp.bfloat16, 16),  # in order
    ],
)
def test_without_races(monkeypatch, capfd, widths, group, rows, dtype, activation_bits):
    monkeypatch.setattr(pallas_tpu, "_INTERPRET", STRICT)
    if rows == 70:
        monkeypatch.setattr(pallas_tpu, "rows_per_block", lambda *_: 64)
    w = make(widths, 130, 200, group, pruned=widths != (2,))
    check(w, inputs(rows, 200, dtype, 300.0), activation_bits)
    assert "RACE" not in capfd.readouterr().out


def test_few_rows_of_any_magnitude():
    w = make((2,), 20, 200, grid="rtn")
    sizes = 2.0 ** np.array([-60, -20, 0, 20, 60, 100], np.float32)
    x = inputs(6, 200, jnp.float32) * sizes[:, None]
    x = x.at[2].set(0)
    check(w, x.astype(jnp.bfloat16), 16)
    x = x.at[1, 7].set(jnp.inf).at[4, 9].set(jnp.nan)
    found = kernels.mixed_matmul(x, w, 16, "pallas_tpu")
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False, False, True, False]


def test_outputs_that_are_in_order_are_not_gathered():
    w = make((4,), 40, 70)
    assert tpu_weight.prepare(w).ordered
    assert tpu_weight.prepare(dataclasses.replace(w, index=None)).ordered
    assert not tpu_weight.prepare(make((4,), 40, 70, pruned=True)).ordered
    assert not tpu_weight.prepare(make((4, 2), 40, 70)).ordered
    # An index that is traced may hold anything.
    traced = jax.eval_shape(tpu_weight.prepare, jax.tree.map(jnp.asarray, w))
    assert not traced.ordered


def test_rows_that_do_not_fit_take_several_passes(monkeypatch):
    w = make((4,), 40, 70)
    prepared = tpu_weight.prepare(w)
    assert pallas_tpu.rows_per_block(75, prepared, 4, 4) == 96
    monkeypatch.setattr(pallas_tpu, "_VMEM_BYTES", 2**10)
    assert pallas_tpu.rows_per_block(75, prepared, 4, 4) == 32
    check(w, inputs(75, 70, jnp.float32), 8)


def test_blocks_follow_the_shape():
    def shape(bits, c, k):
        return tpu_weight.block_shape((Segment(bits, c),), k)

    # Blocks of a mebibyte, without padding.
    assert shape(4, 4096, 4096) == (512, 512)
    # 2-bit blocks of 512 words would cover 8192 inputs.
    assert shape(2, 4096, 4096) == (256, 512)
    # 11008 inputs are 43 times 256: a little padding and few steps.
    depth, lanes = shape(4, 4096, 11008)
    assert -(-11008 // tiles.covered(4, depth)) * tiles.covered(4, depth) < 1.03 * 11008
    assert 2**19 <= 4 * depth * lanes <= 2**20
    # Few channels are not padded to wide tiles.
    assert shape(4, 100, 1024)[1] == 128


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_exact_products_ask_for_no_more_precision(activation_bits):
    # The compiler refuses products of int8 or bfloat16 in float32 precision, and policies set it.
    w = make((16, 4), 20, 200, 48)
    with jax.default_matmul_precision("float32"):
        found = jax.make_jaxpr(lambda x: kernels.mixed_matmul(x, w, activation_bits, "pallas_tpu"))(
            inputs(40, 200)
        )
    products = [e for e in equations(found.jaxpr) if e.primitive.name == "dot_general"]
    exact = [e for e in products if e.invars[0].aval.dtype != jnp.float32]
    assert exact
    assert {p for e in exact for p in e.params["precision"]} == {jax.lax.Precision.DEFAULT}


def equations(jaxpr):
    """All equations, of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
