"""Policies that run from packed weights, and the file that holds them."""

import hashlib
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax import kernels
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.inference.packed_linear import PackedArrays, packed_layers
from qvla_jax.inference.quantize import policy_index, policy_layers, quantize, quantize_uniform
from qvla_jax.kernels import dispatch
from qvla_jax.models import get_module, named_modules
from qvla_jax.quantization import (
    NEAREST_UNCORRECTED,
    InputStatistics,
    Quantizer,
    QuantizerSettings,
    stored_bytes,
    uniform_bytes,
)

from .test_policy import observation

LAYER = "language_model.model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def policy():
    return random_policy("tiny-test")


@pytest.fixture(scope="module")
def index(policy):
    return policy_index(policy)


@pytest.fixture(scope="module")
def quantizer(index):
    rng = np.random.default_rng(0)
    means = {layer.path: rng.normal(size=layer.fan_in) * 0.1 for layer in index.layers}
    return Quantizer(QuantizerSettings(rounding="nearest"), InputStatistics(means))


@pytest.fixture(scope="module")
def bits(index):
    return np.random.default_rng(1).choice([0, 2, 3, 4, 16], size=len(index))


@pytest.fixture(scope="module")
def packed(policy, bits, quantizer):
    return quantize(policy, bits, quantizer=quantizer)


@pytest.fixture(scope="module")
def in_float(policy, bits, quantizer):
    return quantize(policy, bits, quantizer=quantizer, packed=False)


@pytest.fixture
def path(packed, tmp_path):
    packed.save(tmp_path / "p.qvla")
    return tmp_path / "p.qvla"


def test_packed_layers_hold_the_values_of_the_quantizer(packed, in_float, index, bits):
    layers = packed_layers(packed.model)
    assert set(layers) == set(index.paths)
    for layer, rows in index.items():
        weight, linear = layers[layer.path].weight, get_module(in_float.model, layer.path)
        np.testing.assert_array_equal(kernels.dequantize(weight), linear.kernel[...].T)
        np.testing.assert_array_equal(weight.bits(), bits[rows])
        bias = np.zeros(layer.out_features) if weight.bias is None else weight.bias
        expected = 0.0 if linear.bias is None else linear.bias[...]
        np.testing.assert_array_equal(np.asarray(bias, np.float32), jnp.zeros(len(bias)) + expected)


def test_no_matrix_of_floats_is_left_in_quantized_layers(
    policy, index, bits, quantizer, monkeypatch
):
    # As the file has them; the CPU kernel pads such small layers to many times that.
    monkeypatch.setitem(dispatch._PREFERRED, "cpu", ())
    packed = quantize(policy, bits, quantizer=quantizer)
    assert not set(index.paths) & set(named_modules(packed.model, nnx.Linear))
    held = sum(leaf.nbytes for leaf in leaves_of_packed(packed))
    assert held == sum(layer.weight.nbytes for layer in packed_layers(packed.model).values())


def test_kernels_hold_scales_and_biases_as_floats_only(packed):
    floats = [x for x in leaves_of_packed(packed) if jnp.issubdtype(x.dtype, jnp.floating)]
    fan_in = min(layer.weight.shape[1] for layer in packed_layers(packed.model).values())
    assert floats
    assert max(x.size for x in floats) < 16 * fan_in  # less than a tile of weights


def leaves_of_packed(policy):
    # Layers that take the same input hold one weight together: it counts once.
    return jax.tree.leaves(nnx.state(policy.model, PackedArrays))


def test_actions_are_those_of_the_dequantized_weights(packed, in_float, policy):
    obs = observation()
    batch = {k: [v] * 3 if k == "instruction" else np.stack([v] * 3) for k, v in obs.items()}
    found, expected = packed.infer_normalized(batch), in_float.infer_normalized(batch)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - policy.infer_normalized(batch)).max() > 1e-3  # it is quantized
    assert packed.infer(obs).shape == (policy.config.action_horizon, policy.config.action_dim)


def test_stored_bytes_are_those_of_the_account(path, index, bits, policy, tmp_path):
    assert PackedFile(path).packed_bytes == stored_bytes(index, bits)
    # A uniform grid needs neither index nor corrected biases.
    for width in (2, 4, 16):
        quantize_uniform(policy, width).save(tmp_path / "u.qvla")
        assert PackedFile(tmp_path / "u.qvla").packed_bytes == uniform_bytes(index, width)


def test_save_and_load_give_the_same_policy(packed, path, tmp_path):
    loaded = load_policy(path)
    assert type(loaded) is type(packed)
    assert loaded.fingerprint == packed.fingerprint
    assert loaded.quantization == packed.quantization
    np.testing.assert_array_equal(loaded.infer(observation()), packed.infer(observation()))
    loaded.save(tmp_path / "again.qvla")
    assert (tmp_path / "again.qvla").read_bytes() == path.read_bytes()


def test_what_cannot_be_done_with_a_quantized_policy(packed, in_float, policy, index, tmp_path):
    with pytest.raises(InputError, match="quantized already"):
        quantize(packed, np.full(len(index), 4), quantizer=Quantizer(NEAREST_UNCORRECTED))
    with pytest.raises(InputError, match=r"name ending in \.qvla"):
        packed.save(tmp_path / "folder")
    with pytest.raises(InputError, match="no layer of the policy is packed"):
        in_float.save(tmp_path / "folder")
    with pytest.raises(InputError, match="no layer of the policy is packed"):
        policy.save(tmp_path / "p.qvla")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="matches none"):
        policy_layers(packed)


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


def change_header(path, change, *, sign=True):
    """Rewrites the JSON header, with its digest unless told otherwise."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    outer = json.loads(content[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["header"])
    change(header)
    text = json.dumps(header)
    outer["__metadata__"]["header"] = text
    if sign:
        outer["__metadata__"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    encoded = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def place_of(path, name):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0, 0.999))
def test_truncated_files_are_refused(packed, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "p.qvla"
    packed.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "not a readable safetensors file")


@pytest.mark.parametrize("field", ["words", "scales", "index", "bias"])
def test_a_changed_bit_names_the_layer(path, field):
    flip(path, place_of(path, f"{LAYER}.{field}"))
    refused(path, rf"{LAYER}: its bytes are not those that were written")


def test_a_changed_bit_elsewhere_is_found(path):
    flip(path, place_of(path, "projector.fc1.weight"))
    refused(path, "not packed are not those")


def test_a_changed_header_is_found(path):
    change_header(path, lambda header: header["statistics"].clear(), sign=False)
    refused(path, "the header was changed")


def entry(header):
    return next(e for e in header["layers"] if e["path"] == LAYER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(kind="other"), "'other' of version 1"),
        (lambda h: h.update(version=4), "of version 4; this library reads"),
        (lambda h: h.pop("layers"), "lists no layers"),
        (lambda h: h.pop("config"), "unusable header"),
        (lambda h: h["config"].update(typo=1), "unknown key 'typo'"),
        (lambda h: h["layers"].append(entry(h)), "is listed twice"),
        (lambda h: h["layers"].remove(entry(h)), "not packed are not those|unexpected"),
        (lambda h: entry(h).update(path="nowhere"), "layer nowhere: words is missing"),
        (lambda h: entry(h).update(shape=[10**9, 10**9]), rf"{LAYER}: words is uint32"),
        (lambda h: entry(h).update(shape=[4.5, 2]), rf"layer {LAYER}: unusable entry"),
        (lambda h: entry(h).update(group=7), rf"layer {LAYER}: unusable entry"),
        (lambda h: entry(h).update(bias=None), rf"layer {LAYER}: bias is float32"),
        (lambda h: entry(h).update(source_dtype="int8"), rf"layer {LAYER}: unusable entry"),
        (lambda h: entry(h)["segments"].pop(), rf"layer {LAYER}: words is"),
        (lambda h: entry(h)["segments"][0].append(1), rf"layer {LAYER}: unusable entry"),
        (lambda h: entry(h)["segments"].reverse(), rf"{LAYER}: its bytes"),
    ],
)
def test_a_segment_table_that_does_not_fit_is_refused(path, change, message):
    change_header(path, change)
    refused(path, message)


def test_a_failed_write_leaves_the_old_file(path, packed, monkeypatch):
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("qvla_jax.checkpoints.tensor_files._write_header", full)
    with pytest.raises(InputError, match=r"cannot be written \(no space"):
        packed.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["p.qvla"]


def test_files_that_are_no_packed_policy(tmp_path):
    refused(tmp_path / "gone.qvla", "there is no such file")
    (tmp_path / "x.qvla").write_text("hello")
    refused(tmp_path / "x.qvla", "not a readable safetensors file")
