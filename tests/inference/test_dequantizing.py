"""Rounded weights as ordinary parameters, and in the public layout."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from qvla_jax import kernels
from qvla_jax.checkpoints import public_tensors
from qvla_jax.checkpoints.tensor_files import ShardedTensors
from qvla_jax.commands import export as command
from qvla_jax.errors import InputError
from qvla_jax.families.registry import family_of, preset
from qvla_jax.inference import dequantizing
from qvla_jax.inference.dequantizing import dequantized, export_dequantized
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.parity import parity_of
from qvla_jax.inference.policy import make_policy
from qvla_jax.inference.quantize import policy_index, quantize
from qvla_jax.inference.unpacking import folded, unpacked
from qvla_jax.quantization import (
    InputStatistics,
    Quantizer,
    QuantizerSettings,
)
from qvla_jax.quantization.quantizer import UNIFORM_BASELINE
from qvla_jax.quantization.rotation import rotate

UP = "language_model.model.layers.1.mlp.up_proj"
FC1 = "vision_backbone.featurizer.blocks.0.mlp.fc1"


@pytest.fixture(scope="module")
def policy():
    """Random weights, of which none is drawn on the device."""
    config = preset("tiny-test")
    family, rng = family_of(config), np.random.default_rng(0)
    model = family.abstract_model(config)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(jnp.asarray(rng.normal(size=variable.shape), jnp.float32))
    statistics, files = family.random_parts(config)
    return make_policy(config, model, files, statistics, source="random")


@pytest.fixture(scope="module")
def bits(policy):
    return np.random.default_rng(1).choice([0, 3, 16], size=len(policy_index(policy)))


@pytest.fixture(scope="module")
def corrected(policy, bits):
    """Packed, with the biases that the default quantizer adds."""
    rng = np.random.default_rng(0)
    index = policy_index(policy)
    means = {layer.path: rng.normal(size=layer.fan_in) for layer in index.layers}
    settings = QuantizerSettings(grid="rtn", rounding="nearest")
    quantizer = Quantizer(settings, InputStatistics(means))
    return quantize(policy, bits, quantizer=quantizer, embedding_bits=8)


@pytest.fixture(scope="module")
def both(policy, bits):
    """Packed without corrections, and the same in ordinary layers."""
    quantizer = Quantizer(UNIFORM_BASELINE)
    return [quantize(policy, bits, quantizer=quantizer, packed=packed) for packed in (True, False)]


def test_the_exported_weights_are_the_rounded_ones(both, tmp_path):
    expected = public_tensors(both[1].model)
    for source in both:
        found = dequantized(source)
        assert found.dtype == np.float32  # the random weights are no bfloat16 numbers
        assert (found.left_out, found.unread) == ({}, ())
        tensors = public_tensors(found.policy.model)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
    dequantized(both[1], dtype=ml_dtypes.bfloat16).policy.export(tmp_path / "out")
    stored = ShardedTensors(tmp_path / "out")
    for name in stored:
        assert stored[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored[name], tensors[name].astype(ml_dtypes.bfloat16))


def test_parameters_in_bfloat16_are_exported_in_it(both):
    graphdef, parameters, others = nnx.split(both[0].model, nnx.Param, ...)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    model = nnx.merge(graphdef, narrow, others)
    assert dequantized(both[0].replace(model=model)).dtype.name == "bfloat16"


def test_bias_corrections_need_room_or_permission(corrected):
    with pytest.raises(InputError) as error:
        dequantized(corrected)
    assert "bias corrections of 14 layers (2 language_model.mlp.down_proj, " in str(error.value)
    assert "--leave-out bias-corrections" in str(error.value)
    found = dequantized(corrected, leave_out=["bias-corrections"])
    (left_out,) = found.left_out.values()
    layers = packed_layers(corrected.model)
    assert set(left_out) == {path for path in layers if path.startswith("language_model.")}
    # The towers' layers have biases of their own, which hold the corrections.
    tensors = public_tensors(found.policy.model)
    weight = layers[FC1].weight
    np.testing.assert_array_equal(tensors[f"{FC1}.bias"], weight.bias)
    np.testing.assert_array_equal(tensors[f"{FC1}.weight"], kernels.dequantize(weight))
    assert f"{UP}.bias" not in tensors
    for path, table in packed_embeddings(corrected.model).items():
        expected = kernels.dequantize(table.weight)
        np.testing.assert_array_equal(tensors[f"{path}.weight"], expected)


def test_rounding_of_activations_is_not_passed_over(policy, both):
    packed = both[0].replace(model=nnx.merge(*nnx.split(both[0].model)))
    expected = public_tensors(dequantized(packed).policy.model)
    packed_layers(packed.model)[UP].activation_bits = 8
    for source in (packed, unpacked(policy, packed)):
        with pytest.raises(InputError, match=r"activation rounding of 1 layers \(1 language_mode"):
            dequantized(source)
        found = dequantized(source, leave_out=["activation-rounding"])
        assert found.left_out == {"activation-rounding": (UP,)}
        for name, tensor in public_tensors(found.policy.model).items():
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_the_record_says_what_changed(corrected, policy, tmp_path, monkeypatch):
    chunks = iter([np.ones((4, 8, 7)), np.full((4, 8, 7), 1.5)])
    monkeypatch.setattr(dequantizing, "chunks_of", lambda *_: next(chunks))
    with pytest.raises(InputError, match="is not quantized"):
        export_dequantized(policy, tmp_path / "out")
    with pytest.raises(InputError, match="no room"):
        export_dequantized(corrected, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    corrected.save(tmp_path / "p.qvla")
    result = command.main(
        command.Config(
            model=str(tmp_path / "p.qvla"), out=tmp_path / "out", dequantized=True,
            leave_out=("bias-corrections",),
        )
    )  # fmt: skip
    assert "differ by at most 0.5, RMS 0.5 (of actions of RMS 1)" in result.lines[1]
    record = json.loads((tmp_path / "out" / dequantizing.RECORD).read_text())
    assert record["parity"] == result.content["parity"]
    assert len(record["left_out"]["bias-corrections"]) == 14
    with pytest.raises(InputError, match="leave_out: only"):
        command.main(command.Config(model="x", out=tmp_path, leave_out=("bias-corrections",)))


def test_parity_counts_what_the_robot_executes(policy):
    own = np.zeros((2, 8, 7), np.float32)
    found = own.copy()
    found[1, 3, 2] = 0.5
    parity = parity_of(policy, own, found)
    assert (parity.observations, parity.largest, parity.actions_rms) == (2, 0.5, 0.0)
    assert parity.rms == pytest.approx(0.5 / np.sqrt(2 * 8 * 7))


def test_a_kernel_takes_what_a_layer_does_to_its_inputs():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 24)), rng.normal(size=(24, 5))
    scale = rng.uniform(0.5, 2, 24).astype(np.float32)
    expected = np.asarray(rotate(jnp.asarray(x * scale, jnp.float32))) @ kernel
    found = folded(jnp.asarray(kernel, jnp.float32), scale, rotated=True)
    np.testing.assert_allclose(x @ np.asarray(found), expected, atol=1e-5)
