"""The rotation against a dense Hadamard matrix, and rotated rows through packing."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qvla_jax.inference import random_policy
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import policy_index, quantize
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.models.surgery import get_module
from qvla_jax.quantization import LayerRules, Quantizer, QuantizerSettings
from qvla_jax.quantization.rotation import rotate, rotate_back

RULES = LayerRules(include=(r"vision_backbone\.featurizer\.blocks\.0\.mlp\.fc1",))


@pytest.mark.parametrize("size", [43, 48])
def test_rotation_is_a_hadamard_matrix_of_blocks_with_signs(size):
    matrix = np.asarray(rotate(jnp.eye(size)), np.float64)
    block = math.gcd(size, 64)
    dense = scipy.linalg.block_diag(*[scipy.linalg.hadamard(block)] * (size // block))
    np.testing.assert_allclose(np.abs(matrix), np.abs(dense) / block**0.5, atol=1e-6)
    # Row i is the matrix's own row, with the sign of input i.
    ratio = np.where(dense != 0, matrix * block**0.5 / np.where(dense == 0, 1, dense), np.nan)
    signs = np.nanmean(ratio, axis=1)
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-6)
    assert -0.5 < signs.mean() < 0.5
    x = np.random.default_rng(0).normal(size=(2, 3, size))
    found = rotate(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, x @ matrix, atol=1e-5)
    np.testing.assert_allclose(rotate_back(found), x, atol=1e-5)


def test_an_outlier_no_longer_decides_the_range():
    x = np.zeros((1, 64), np.float32)
    x[0, 7] = 8
    assert np.abs(rotate(jnp.asarray(x))).max() == pytest.approx(1)


def test_packed_rows_are_those_of_ordinary_layers():
    policy = random_policy("tiny-test", seed=0)
    index = policy_index(policy, RULES)
    bits = np.resize([0, 2, 3, 4, 8, 16], len(index))
    quantizer = Quantizer(
        QuantizerSettings(rounding="nearest", bias_correction=False, rotation=True)
    )
    packed = quantize(policy, bits, quantizer=quantizer, rules=RULES)
    plain = quantize(policy, bits, quantizer=quantizer, rules=RULES, packed=False)
    assert all(layer.inputs.rotated for layer in packed_layers(packed.model).values())
    back = unpacked(policy, packed)
    for layer, rows in index.items():
        kernels = [get_module(p.model, layer.path).kernel[...] for p in (plain, back)]
        np.testing.assert_allclose(*kernels, atol=1e-5)
        source = get_module(policy.model, layer.path).kernel[...]
        # What the sensitivities cost is what is packed; 16 bits cost nothing there.
        changes = quantizer.row_changes(layer.path, source.T, (0, 2, 3, 4, 8))
        option = np.resize([0, 1, 2, 3, 4, 4], len(index))[rows]
        costed = np.asarray(source.T) + np.asarray(changes)[option, np.arange(len(option))]
        on_grid = bits[rows] < 16
        np.testing.assert_allclose(np.asarray(kernels[0]).T[on_grid], costed[on_grid], atol=1e-5)
        x = np.random.default_rng(0).normal(size=(3, layer.fan_in)).astype(np.float32)
        ran = get_module(packed.model, layer.path)(jnp.asarray(x))
        np.testing.assert_allclose(ran, get_module(back.model, layer.path)(x), atol=2e-2)
