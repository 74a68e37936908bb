"""Packed layers that scale and round their inputs, and the file that says so."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qvla_jax import kernels
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.inference.packed_linear import PackedLinear, packed_layers
from qvla_jax.inference.quantize import quantize_uniform
from qvla_jax.quantization import LayerRules

LAYER = "language_model.model.layers.0.self_attn.q_proj"


def scale(k):
    values = np.exp(np.random.default_rng(0).normal(size=k))
    return values.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("bits", [16, 8])
def test_inputs_are_scaled_then_rounded(bits):
    rng = np.random.default_rng(1)
    w = kernels.pack(rng.normal(size=(24, 48)).astype(np.float32), np.full(24, 8), index=False)
    x, factor = rng.normal(size=(5, 48)), scale(48).astype(np.float64)
    scaled = x * factor
    if bits == 8:
        step = np.abs(scaled).max(axis=1, keepdims=True) / 127
        scaled = np.round(scaled / step) * step
    expected = scaled @ np.asarray(kernels.dequantize(w), np.float64).T
    layer = PackedLinear(w, activation_bits=bits, input_scale=scale(48))
    found = layer(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-2 * np.abs(expected).max())
    assert layer.inputs.activation_bits == bits
    np.testing.assert_array_equal(layer.inputs.scale, scale(48))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rules = LayerRules(include=(r"language_model\.model\.layers\.0\.self_attn\.[qk]_proj",))
    packed = quantize_uniform(random_policy("tiny-test"), 8, rules=rules)
    layers = packed_layers(packed.model)
    k = layers[LAYER].weight.shape[1]
    changed = PackedLinear(layers[LAYER].weight, activation_bits=8, input_scale=scale(k))
    packed.model.language_model.model.layers[0].self_attn.q_proj = changed
    path = tmp_path_factory.mktemp("scaled") / "p.qvla"
    packed.save(path)
    return packed, path, k


def test_the_file_keeps_both_and_counts_the_scale(saved):
    packed, path, k = saved
    file = PackedFile(path)
    assert file.header["version"] == 2
    weights = sum(layer.weight.nbytes for layer in packed_layers(packed.model).values())
    assert file.packed_bytes == weights + 2 * k
    loaded = load_policy(path)
    for name, layer in packed_layers(loaded.model).items():
        assert layer.inputs.is_plain == (name != LAYER)
    np.testing.assert_array_equal(packed_layers(loaded.model)[LAYER].inputs.scale, scale(k))
    assert loaded.fingerprint == dataclasses.replace(packed).fingerprint


def test_the_fingerprint_tells_other_scales(saved):
    packed, _, _ = saved
    before = packed.fingerprint
    layer = packed_layers(packed.model)[LAYER]
    doubled = layer.input_scale.get_value() * jnp.bfloat16(2)
    state = layer.input_scale.get_value()
    layer.input_scale.set_value(doubled)
    other = dataclasses.replace(packed).fingerprint
    layer.input_scale.set_value(state)
    assert other != before


def test_a_scale_that_is_not_positive_is_refused(saved, monkeypatch):
    _, path, _ = saved
    file = PackedFile(path)
    name = f"{LAYER}.input_scale"

    class Changed(dict):
        def __missing__(self, key):
            return file_tensors[key]

    file_tensors = file._file
    bad = -np.asarray(file_tensors[name])
    monkeypatch.setattr(file, "_file", Changed({name: bad}))
    with pytest.raises(CheckpointError, match=f"{LAYER}: input scale"):
        file.inputs(LAYER)


@pytest.mark.parametrize("bad", [[1.0, 0.0], [np.inf, 1.0], [1.001, 1.0], [[1.0]]])
def test_scales_that_cannot_be_stored_are_refused(bad):
    with pytest.raises(InputError, match="positive bfloat16"):
        kernels.LayerInputs(8, np.asarray(bad, np.float32))


def test_unknown_activation_bits_are_refused():
    with pytest.raises(InputError, match="activation_bits 5"):
        kernels.LayerInputs(5)
    assert jax.tree.leaves(kernels.LayerInputs().scale) == []
