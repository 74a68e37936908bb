"""Strange numbers through quantizer, packing, kernels and solvers: defined, or one clear error.

docs/reliability.md lists these tests beside the older ones of each package.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import policy_index, quantize
from qvla_jax.kernels import cpu
from qvla_jax.models import get_module
from qvla_jax.quantization import NEAREST_UNCORRECTED, Quantizer
from qvla_jax.quantization.codes import GRID_BITS
from qvla_jax.quantization.grid import dequantize_rows, quantize_rows
from qvla_jax.solvers import AllocationProblem, available, solve

COMPILED = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernel")
    ),
]
# Smallest bfloat16 scale; what lies below half a step of it rounds to zero.
TINY = 2e-38


def strange_rows(k: int) -> np.ndarray:
    """f32[8, k]: zeros, constants of both signs, denormals, the largest, one weight, ordinary."""
    single = np.zeros(k)
    single[k // 2] = 1.0
    alternating = 1e-40 * (-1.0) ** np.arange(k)
    ordinary = np.random.default_rng(0).normal(size=k)
    constants = [np.full(k, value) for value in (0.0, 0.37, -2.5, 1e-40, 1e30)]
    return np.stack([*constants, alternating, single, ordinary]).astype(np.float32)


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("grid", ["rtn", "fitted"])
def test_constant_and_denormal_channels_stay_within_half_a_step(bits, grid):
    rows = strange_rows(5)
    codes, scale = quantize_rows(jnp.asarray(rows), bits, grid=grid)
    back = np.asarray(dequantize_rows(codes, scale), np.float64)
    step = np.asarray(scale, np.float64).reshape(-1, 1) * (2 if bits == 2 else 1)
    # A fitted grid may clip the ordinary row, the last one.
    assert (np.abs(back - rows) <= 0.51 * step + TINY)[:-1].all()
    assert np.isfinite(back).all()


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_kernels_multiply_strange_rows_by_strange_activations(implementation, activation_bits):
    k = 33  # no multiple of any word
    rows = strange_rows(k)
    w = kernels.pack(rows, np.array([2, 3, 4, 8, 16, 8, 0, 4]), source_dtype="float32")
    x = np.concatenate([strange_rows(k)[[0, 1, 2, 3, 5]], np.ones((1, k), np.float32)])
    found = np.asarray(
        kernels.mixed_matmul(
            jnp.asarray(x), w, activation_bits=activation_bits, implementation=implementation
        ),
        np.float64,
    )
    assert np.isfinite(found).all()
    values, x = np.asarray(kernels.dequantize(w), np.float64), x.astype(np.float64)
    exact, size = x @ values.T, np.abs(x) @ np.abs(values).T
    # Denormal activations count as zeros, on the CPU as on accelerators.
    flushed = TINY * (np.abs(values).sum(axis=1) + k)
    # Eight bits for activations, or bfloat16's eight of the mantissa.
    np.testing.assert_array_less(np.abs(found - exact), 2**-7 * size + flushed)


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("bits", [0, 2, 3, 4, 8, 16])
def test_a_single_channel_is_multiplied(implementation, bits):
    k = 9
    weight = np.linspace(-1, 1, k, dtype=np.float32)[None] + 0.5
    w = kernels.pack(weight, np.array([bits]), source_dtype="float32")
    y = kernels.mixed_matmul(jnp.ones((2, k)), w, implementation=implementation)
    expected = np.asarray(kernels.dequantize(w), np.float64).sum()
    np.testing.assert_allclose(y, np.full((2, 1), expected), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_scales_that_are_no_scales_are_refused(value):
    weight = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    w = kernels.pack(weight, np.full(3, 4))
    scales = tuple(np.full_like(np.asarray(a), value) for a in w.scales)
    with pytest.raises(InputError, match=r"file\.qvla: .*scale"):
        kernels.validate(dataclasses.replace(w, scales=scales), where="file.qvla")
    rows = kernels.nearest_rows(weight, np.full(3, 4))
    rows = dataclasses.replace(rows, scales=np.full((3, 1), value))
    with pytest.raises(InputError, match="scale"):
        kernels.pack_rows(rows, weight)


def test_layers_of_pruned_and_of_zero_channels_run_and_come_back(tmp_path):
    policy = random_policy("tiny-test", seed=0)
    index = policy_index(policy)
    pruned, zero = index.layers[0].path, index.layers[1].path
    kernel = get_module(policy.model, zero).kernel
    kernel.set_value(jnp.zeros_like(kernel[...]))
    bits = np.full(len(index), 4)
    bits[: index.layers[0].out_features] = 0
    packed = quantize(policy, bits, quantizer=Quantizer(NEAREST_UNCORRECTED))
    packed.save(tmp_path / "p.qvla")
    loaded = load_policy(tmp_path / "p.qvla")
    observation = policy.fake_observation(0)
    assert np.isfinite(loaded.infer(observation)).all()
    assert loaded.fingerprint == packed.fingerprint
    for path in (pruned, zero):
        source, layer = get_module(policy.model, path), packed_layers(loaded.model)[path]
        x = jnp.linspace(-3.0, 5.0, 2 * source.in_features).reshape(2, -1)
        bias = 0.0 if source.bias is None else np.asarray(source.bias[...], np.float32)
        expected = np.broadcast_to(bias, (2, source.out_features))
        np.testing.assert_array_equal(np.asarray(layer(x), np.float32), expected)


SIZES = np.array([[0, 4, 8, 16], [0, 2, 4, 8], [0, 4, 8, 16]])


# The search by evolution starts from the solutions of the others.
QUICK = [name for name in available() if name != "evolutionary"]


@pytest.mark.parametrize("name", QUICK)
def test_budgets_at_both_ends(name):
    costs = np.array([[9.0, 4, 1, 0], [5, 2, 1, 0], [7, 3, 1, 0]])
    least = solve(AllocationProblem(costs=costs, sizes=SIZES, budget=0), name)
    assert least.choice.tolist() == [0, 0, 0]
    for budget in (40, 10**12):
        most = solve(AllocationProblem(costs=costs, sizes=SIZES, budget=budget), name)
        assert most.choice.tolist() == [3, 3, 3]
        assert most.cost == 0


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("scale", [0.0, 5e-324, 1e-300])
def test_costs_of_zero_and_denormal_costs_are_solved(name, scale):
    costs = scale * np.array([[9.0, 4, 1, 0], [5, 2, 1, 0], [7, 3, 1, 0]])
    solution = solve(AllocationProblem(costs=costs, sizes=SIZES, budget=17), name)
    assert np.isfinite(solution.cost)
    assert solution.size <= 17
