"""Packed layers as qwix's arrays, loaded by orbax and qwix alone."""

import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix

from qvla_jax import kernels
from qvla_jax.commands import export_qwix
from qvla_jax.errors import InputError
from qvla_jax.families.registry import register
from qvla_jax.inference import random_policy
from qvla_jax.inference.packed_linear import PackedLinear, packed_layers
from qvla_jax.inference.qarrays import DESCRIPTION, PARAMS, export_qarrays, qarray_parts, why_dense
from qvla_jax.inference.quantize import quantize_uniform
from qvla_jax.methods.numerics import qwix_context

from ..families.test_toy_family import Toy

KERNEL = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [([4], None, "int4"), ([4], 16, "int4"), ([0, 2, 3, 4], None, "int4"), ([8, 2, 0], 16, "int8")],
)
def test_qwix_multiplies_by_our_weights(bits, group, dtype):
    weight = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    packed = kernels.pack(weight, np.resize(bits, 6), group, index=len(bits) > 1)
    array = qwix.QArray(**qarray_parts(packed))
    assert array.qvalue.dtype == dtype
    expected = np.asarray(kernels.dequantize(packed)).T
    with qwix_context():
        np.testing.assert_array_equal(qwix.dequantize(array), expected)
        np.testing.assert_array_equal(qwix.dot_general(jnp.eye(32), array, KERNEL), expected)


@pytest.mark.parametrize(
    ("bits", "group", "arguments", "reason"),
    [
        (16, None, {}, "keeps its 16 bits"),
        (4, 16, {}, "groups of 16 do not divide its 40 inputs"),
        (4, None, {"input_scale": np.full(40, 0.5, np.float32)}, "are scaled"),
        (4, None, {"rotated": True}, "are rotated"),
    ],
)
def test_other_layers_stay_dense(bits, group, arguments, reason):
    weight = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    packed = kernels.pack(weight, np.resize([bits, 4], 4), group)
    assert reason in str(why_dense(PackedLinear(packed, implementation="reference", **arguments)))


def test_an_exported_policy_is_read_without_us(tmp_path):
    register(Toy())
    policy = random_policy("toy")
    packed = quantize_uniform(policy, 4)
    with pytest.raises(InputError, match=r"no layer is packed; give a \.qvla file"):
        export_qarrays(policy, tmp_path / "out")
    packed.save(tmp_path / "p.qvla")
    settings = export_qwix.Config(model=str(tmp_path / "p.qvla"), qwix=tmp_path / "out")
    assert export_qwix.main(settings).content["qarrays"] == {"first": "int4"}
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(tmp_path / "out" / PARAMS)
    (layer,) = packed_layers(packed.model).values()
    found = qwix.dequantize(qwix.QArray(**params["first"]["kernel"]))
    np.testing.assert_array_equal(found, kernels.dequantize(layer.weight).T)
    np.testing.assert_array_equal(params["first"]["bias"], layer.weight.bias)
    np.testing.assert_array_equal(params["second"]["kernel"], policy.model.second.kernel[...])
    known = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert (known["qarrays"], known["dense"]) == ({"first": "int4"}, {})
    with pytest.raises(InputError, match="holds files already"):
        export_qarrays(packed, tmp_path / "out")
