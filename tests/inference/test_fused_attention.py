"""Packed policies run attention in the CPU kernel, and in XLA wherever that is not possible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.inference import random_policy
from qvla_jax.inference.fused_attention import FusedAttention, fuse_attention, separate_attention
from qvla_jax.inference.packed_linear import replace_by_packed
from qvla_jax.inference.stablehlo import _named, portable_function
from qvla_jax.kernels import cpu_attention
from qvla_jax.models.attention import DotProduct, attention
from qvla_jax.models.surgery import named_modules

needs_kernel = pytest.mark.skipif(not cpu_attention.supported(), reason="no compiled CPU kernel")


class Two(nnx.Module):
    def __init__(self):
        self.first, self.second = DotProduct(), DotProduct(lambda q, k, v, mask: v)


def operands(*leading):
    rng = np.random.default_rng(0)
    shapes = (*leading, 1, 7, 4, 8), (*leading, 1, 9, 2, 8), (*leading, 1, 9, 2, 8)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v, jnp.asarray(rng.random((1, 1, 7, 9)) < 0.8)


@needs_kernel
def test_attention_is_replaced_and_put_back():
    model = Two()
    functions = model.first.function, model.second.function
    replace_by_packed(model, [], same_input=())
    assert list(named_modules(model, FusedAttention)) == ["first", "second"]
    q, k, v, mask = operands()
    np.testing.assert_allclose(model.first(q, k, v, mask), attention(q, k, v, mask), atol=2e-6)
    separate_attention(model)
    assert (model.first.function, model.second.function) == functions


def test_without_a_kernel_it_stays(monkeypatch):
    monkeypatch.setattr(cpu_attention, "supported", lambda: False)
    model = Two()
    fuse_attention(model)
    assert not named_modules(model, FusedAttention)


@needs_kernel
def test_derivatives_are_those_of_the_replaced_function():
    fused, (*inputs, mask) = FusedAttention(attention), operands()
    tangents = tuple(jnp.cos(x) for x in inputs)
    pairs = [
        jax.jit(lambda *given, f=f: jax.jvp(lambda *qkv: f(*qkv, mask), given, tangents))(*inputs)
        for f in (fused, attention)
    ]
    np.testing.assert_array_equal(*pairs[:2])
    batched, mask = operands(3)[:3], operands()[3]
    grads = [
        jax.vmap(jax.grad(lambda q, k, v, f=f: jnp.sum(jnp.sin(f(q, k, v, mask)))))(*batched)
        for f in (fused, attention)
    ]
    np.testing.assert_allclose(*grads, atol=1e-6)
    outputs = [
        jax.vmap(lambda q, k, v, f=f: f(q, k, v, mask))(*batched) for f in (fused, attention)
    ]
    np.testing.assert_allclose(*outputs, atol=2e-6)


@needs_kernel
def test_exported_functions_do_not_call_the_kernel():
    policy = random_policy("tiny-test")
    fuse_attention(policy.model)
    assert named_modules(policy.model, FusedAttention)
    inputs = policy.prepare({key: [value] for key, value in policy.fake_observation().items()})
    function, weights = portable_function(policy, inputs)
    traced = jax.make_jaxpr(function)(weights, _named(inputs))
    assert "ffi_call" not in str(traced)
