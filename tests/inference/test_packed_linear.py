"""Packed layers that take the same input: one weight, one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax import kernels
from qvla_jax.inference.packed_linear import (
    PackedLinear,
    joint_layers,
    packed_layers,
    replace_by_packed,
)
from qvla_jax.kernels import cpu


def weights(rng, k=40, bits=(0, 2, 4, 8)):
    return [
        kernels.pack(
            rng.normal(size=(c, k)).astype(np.float32), rng.choice(bits, c), 16
        )
        for c in (24, 8, 17)
    ]  # fmt: skip


@pytest.fixture
def layers():
    return joint_layers(weights(np.random.default_rng(0)), activation_bits=8)


def test_each_layer_gives_what_it_gives_alone(layers):
    x = jax.random.normal(jax.random.key(0), (2, 5, 40))
    for layer, w in zip(layers, weights(np.random.default_rng(0)), strict=True):
        np.testing.assert_allclose(layer(x), PackedLinear(w, activation_bits=8)(x), rtol=1e-6)
        same = jax.tree.map(np.array_equal, layer.weight, w)
        assert all(jax.tree.leaves(same))


@pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernel")
@pytest.mark.parametrize("bits", [(0, 2, 4, 8), (4, 16)], ids=["quantized", "float32 rows"])
def test_layers_of_one_input_are_one_call(bits):
    layers = joint_layers(weights(np.random.default_rng(0), bits=bits), activation_bits=8)
    graphdef, state = nnx.split(nnx.List(layers))

    def run(state, x):
        q, k, v = (layer(x) for layer in nnx.merge(graphdef, state))
        return q[:, :8] * k + v[:, :8]

    compiled = jax.jit(run).lower(state, jnp.ones((3, 40))).compile()
    assert compiled.as_text().count('custom_call_target="qvla_matmul"') == 1


class Mlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.gate_proj = nnx.Linear(16, 8, rngs=rngs)
        self.up_proj = nnx.Linear(16, 8, rngs=rngs)
        self.down_proj = nnx.Linear(8, 16, rngs=rngs)


def packed(linear, bits, grid="fitted"):
    weight = np.asarray(linear.kernel[...].T)
    return kernels.pack(weight, np.full(linear.out_features, bits), grid=grid)


@pytest.mark.parametrize(("grid", "held"), [("fitted", 2), ("rtn", 3)])
def test_neighbours_are_joined_where_they_can_be(grid, held):
    model = nnx.Dict(a=Mlp())
    mlp = model.a
    new = [
        ("a.down_proj", packed(mlp.down_proj, 8)),
        ("a.gate_proj", packed(mlp.gate_proj, 2)),
        ("a.up_proj", packed(mlp.up_proj, 2, grid)),  # codes of "rtn" mean other integers
    ]
    replace_by_packed(model, new, same_input=(("gate_proj", "up_proj"),))
    found = packed_layers(model)
    assert list(found) == [name for name, _ in new]
    for name, w in new:
        np.testing.assert_array_equal(kernels.dequantize(found[name].weight), kernels.dequantize(w))
    arrays = {id(layer.arrays) for layer in found.values()}
    assert len(arrays) == held
