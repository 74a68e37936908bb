"""The order of words for tensor cores, and codes as bfloat16 in their places."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qvla_jax import kernels
from qvla_jax.kernels import fragments, gpu_kernels, pallas_gpu
from qvla_jax.kernels.fragments import RUN
from qvla_jax.quantization.codes import SIGNED, SOURCE_CODES, CodeMap

from .weights import pack_codes

MAPS = [(2, SIGNED[2]), (2, CodeMap(2, -3)), (4, SIGNED[4]), (8, SIGNED[8])]


def constants(words, bits, codes):
    return {mask: fragments.filled(words, mask) for mask in fragments.masks(bits, codes)}


@pytest.mark.parametrize(("bits", "codes"), MAPS)
def test_every_code_of_every_field_becomes_its_number(bits, codes):
    # 64 channels at the same input have different codes: four runs hold all 256.
    u = (np.arange(128)[:, None] + 64 * (np.arange(4 * RUN) // RUN) + np.arange(4 * RUN)) % 2**bits
    fields = (u ^ 2 ** (bits - 1)).astype(np.uint8)
    words = fragments.blocked(fields, bits, fragments.DEPTH, fragments.LANES)
    padded = 4 * RUN + -4 * RUN % (fragments.runs(bits) * RUN)
    np.testing.assert_array_equal(fragments.unblocked(words, bits, 1)[:, : 4 * RUN], fields)
    by_group = words.reshape(-1, 2, 16 // bits, bits, 128)  # block, warpgroup, run
    for run in range(4):
        block, part = divmod(run, fragments.runs(bits))
        held = jnp.asarray(by_group[block, 0, part])
        found = fragments.pairs(held, bits, codes, constants(held, bits, codes))
        expected = codes.multiplier * u[:64, run * RUN : (run + 1) * RUN] + codes.offset
        matrix = fragments.matrix(found, bits)
        assert matrix.dtype == jnp.bfloat16
        np.testing.assert_array_equal(matrix.astype(jnp.float32), expected)
        if bits < 8:  # the constants that come off the sums instead
            plain = fragments.matrix(found._replace(above=[None] * len(found.above)), bits)
            above = fragments.constants_of(found, bits).astype(np.float32)
            np.testing.assert_array_equal(np.asarray(plain, np.float32) - above, expected)
    assert words.size == 128 * padded * bits // 32


def test_16_bit_rows_keep_their_bits():
    numbers = np.random.default_rng(0).normal(size=(128, 130)).astype(ml_dtypes.bfloat16)
    words = fragments.blocked(numbers.view(np.uint16), 16, fragments.DEPTH, fragments.LANES)
    found = fragments.pairs(jnp.asarray(words[1, 16:]), 16, SOURCE_CODES, {})
    np.testing.assert_array_equal(fragments.matrix(found, 16), numbers[64:, 64:128])


def test_a_thread_has_the_inputs_of_the_instruction():
    # Thread 32 w + 4 g + p, as the manual of `mma` and `wgmma` has it (PTX ISA, m16n8k16).
    x = jnp.arange(16 * 192, dtype=jnp.float32).reshape(16, 192).astype(jnp.bfloat16)
    words = fragments.columns(x)
    for run in range(3):
        np.testing.assert_array_equal(
            fragments.restored_columns(words[run]), x[:, run * RUN : (run + 1) * RUN]
        )
    pairs = jax.lax.bitcast_convert_type(words, jnp.bfloat16)
    g, p, step, eight = 5, 3, 2, 1
    np.testing.assert_array_equal(
        pairs[1, 1, 4 * g + p, 2 * step + eight],
        x[8 + g, (first := RUN + 16 * step + 8 * eight + 2 * p) : first + 2],
    )


@pytest.mark.parametrize("codes", [SIGNED[4], CodeMap(2, -3)])
def test_constants_cancel_where_activations_have_a_large_mean(codes):
    bits = 4 if codes.multiplier == 1 else 2
    rng = np.random.default_rng(0)
    c, k = 128, 2048
    q = codes.multiplier * rng.integers(0, 2**bits, (c, k)) + codes.offset
    w = pack_codes(np.zeros((c, k), np.float32), np.full(c, bits), q, np.ones((c, 1)))
    x = jnp.asarray(rng.normal(100, 1, (8, k)), jnp.bfloat16)
    tiled = kernels.prepare(w, "pallas_gpu").tiled
    launch, streamed = pallas_gpu.division(tiled, 8, False, 0)
    assert launch.fast
    assert not streamed
    operands = [fragments.columns(jnp.pad(x, ((0, 0), (0, tiled.padded_k - k))))]
    sums = gpu_kernels.direct(launch, operands, tiled.words, tiled.scales, interpret=True)
    exact = q.astype(np.float64) @ np.asarray(x, np.float64).T
    length = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(np.asarray(x, np.float64), axis=1)
    # An eighth of a thousandth part of what rounding the output to bfloat16 changes.
    assert (np.abs(np.asarray(sums).sum(axis=0) - exact) <= 2.0**-21 * length).all()
