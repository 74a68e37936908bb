"""A policy as StableHLO: packed in its arguments, and run where this package is not."""

import json
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from qvla_jax import kernels
from qvla_jax.checkpoints.tensor_files import TensorFile
from qvla_jax.commands import export_stablehlo as command
from qvla_jax.errors import InputError
from qvla_jax.families.registry import register
from qvla_jax.inference import random_policy
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import policy_index, quantize
from qvla_jax.inference.stablehlo import (
    DESCRIPTION,
    FUNCTION,
    PLATFORMS,
    WEIGHTS,
    export_stablehlo,
)
from qvla_jax.kernels.portable import prepare
from qvla_jax.quantization import Quantizer, QuantizerSettings

from ..families.test_toy_family import Toy

# Only what JAX itself needs may be imported.
ELSEWHERE = """
import runpy, sys
for name in ("qvla_jax", "flax", "orbax", "safetensors"):
    sys.modules[name] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.fixture(scope="module")
def packed():
    """The policy of a state: every width, rotated inputs that are rounded to 8 bits."""
    register(Toy())
    policy = random_policy("toy")
    settings = QuantizerSettings(rounding="nearest", bias_correction=False, rotation=True)
    bits = np.resize([0, 2, 3, 4, 8, 16], len(policy_index(policy)))
    made = quantize(policy, bits, quantizer=Quantizer(settings))
    (layer,) = packed_layers(made.model).values()
    layer.activation_bits = 8
    return made


def test_a_process_with_jax_alone_acts_like_the_policy(packed, tmp_path):
    packed.save(tmp_path / "p.qvla")
    settings = command.Config(model=str(tmp_path / "p.qvla"), stablehlo=tmp_path / "out")
    parity = command.main(settings).content["parity"]
    assert parity["largest"] < 1e-5 < parity["actions_rms"]
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "out" / "run.py")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(ran.stdout)
    assert found["platform"] == "cpu"
    assert found["largest_difference"] < 1e-5
    exported = jax.export.deserialize(bytearray((tmp_path / "out" / FUNCTION).read_bytes()))
    assert exported.platforms == PLATFORMS
    text = exported.mlir_module()
    assert "custom_call" not in text
    # Weights are arguments: the only constants are single numbers, repeated or not, and the signs
    # of the rotation.
    assert max(map(len, re.findall(r"dense<[^>]*>", text))) < 150
    (layer,) = packed_layers(packed.model).values()
    held = sum(entry.nbytes for entry in TensorFile(tmp_path / "out" / WEIGHTS).values())
    kernel = packed.model.second
    assert held == layer.weight.nbytes + kernel.kernel.nbytes + kernel.bias.nbytes
    known = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert known["inputs"] == [{"name": "inputs", "shape": [1, 8], "dtype": "float32"}]
    assert known["output"]["shape"] == [1, 8, 7]
    assert known["statistics"]["by_data_set"] == packed.statistics
    example = np.load(tmp_path / "out" / "example.npz")
    np.testing.assert_array_equal(example["robot_actions"], example["actions"] * 0.5)
    chunk = packed.infer({"state": example["2.observation.state"]})
    np.testing.assert_allclose(example["robot_actions"][2], chunk, atol=1e-6)
    with pytest.raises(InputError, match="holds files already"):
        export_stablehlo(packed, tmp_path / "out")


def test_portable_products_are_those_of_the_reference():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 40)).astype(np.float32)
    bits = np.resize([2, 0, 16, 3, 8, 4], 12)
    packed = kernels.pack(weight, bits, 16, bias=rng.normal(size=12).astype(np.float32))
    x = rng.normal(size=(2, 3, 40)).astype(np.float32)
    portable = prepare(jax.tree.map(jax.numpy.asarray, packed))
    product = jax.jit(kernels.mixed_matmul, static_argnums=(2, 3))
    found = product(x, portable, 16, None)
    expected = product(x, packed, 16, "reference")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert kernels.canonical(portable) is portable.weight


def test_layers_are_not_unpacked_before_they_are_used():
    packed = kernels.pack(np.ones((512, 512), np.float32), np.full(512, 4), grid="rtn")
    weights = [prepare(jax.tree.map(jax.numpy.asarray, packed))] * 4

    def network(x, weights):
        for weight in weights:
            x = kernels.mixed_matmul(x, weight)
        return x

    compiled = jax.jit(network).lower(np.ones((1, 512), np.float32), weights).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1.5 * 4 * 512 * 512  # that of one layer, not of all four
