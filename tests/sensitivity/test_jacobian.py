"""First-order costs against derivatives taken another way, and against the exact quadratic form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.inference.quantize import policy_index
from qvla_jax.models import get_module
from qvla_jax.quantization.grid import on_grid
from qvla_jax.sensitivity.accumulate import mean_over_frames
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.jacobian import frame_costs, layer_constants
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.sharding import sweep_mesh

from .toys import LLM, UNREACHED, ToyFrames, take_inputs

BITS = (0, 2, 4, 8)


def costs_of(policy, frames, quantizer, *, bits=BITS, method="jacobian", probes="full", **settings):
    sweep = sweep_of(policy, frames, quantizer, bits, **settings)
    constants = layer_constants(sweep.layers, quantizer, bits)
    return mean_over_frames(frame_costs(sweep, constants, method=method, probes=probes))


def sweep_of(policy, frames, quantizer, bits, **settings):
    return Sweep(
        policy=policy, calibration=frames, index=policy_index(policy), quantizer=quantizer,
        bits=bits, **settings,
    )  # fmt: skip


def directional_costs(policy, frames, quantizer, path):
    """|| d/de A(W + e dW, b + e db) ||^2 by forward mode in the weights, channel after channel."""
    graphdef, state = nnx.split(policy.model)
    inputs = take_inputs(frames.whole())

    def action(kernel, shift):
        model = nnx.merge(graphdef, state)
        linear = get_module(model, path)
        linear.kernel = nnx.Param(kernel)
        bias = shift if linear.bias is None else linear.bias[...] + shift
        linear.bias, linear.use_bias = nnx.Param(bias), True
        return model(inputs)

    kernel = get_module(policy.model, path).kernel[...]
    zero = jnp.zeros(kernel.shape[1])
    derivative = jax.jit(lambda dw, db: jax.jvp(action, (kernel, zero), (dw, db))[1])
    result = np.zeros((kernel.shape[1], len(BITS)))
    for option, bits in enumerate(BITS):
        change = on_grid(kernel.T, bits, grid="fitted").T - kernel
        shift = -jnp.asarray(quantizer.mean(path), jnp.float32) @ change
        for channel in range(kernel.shape[1]):
            only = jnp.arange(kernel.shape[1]) == channel
            d = derivative(jnp.where(only[None], change, 0), jnp.where(only, shift, 0))
            result[channel, option] = np.mean(np.sum(np.asarray(d, np.float64) ** 2, axis=(1, 2)))
    return result


@pytest.mark.parametrize(
    "path",
    [
        LLM,
        "language_model.model.layers.0.attn",
        "vision_backbone.fused_featurizer.blocks.0.fc",
    ],
)
def test_full_probes_equal_directional_derivatives(policy, frames, index, quantizer, path):
    costs, _ = costs_of(policy, frames, quantizer)
    rows = dict((layer.path, where) for layer, where in index.items())[path]
    np.testing.assert_allclose(
        costs[rows], directional_costs(policy, frames, quantizer, path), rtol=2e-3, atol=1e-10
    )


def test_a_linear_model_has_no_higher_order(linear_policy, frames, quantizer):
    first, _ = costs_of(linear_policy, frames, quantizer)
    exact, _ = exact_costs(sweep_of(linear_policy, frames, quantizer, BITS), block=32)
    np.testing.assert_allclose(first, exact, rtol=1e-3, atol=1e-9)


def test_small_changes_agree_with_exact_on_a_curved_model(policy, frames, quantizer):
    first, _ = costs_of(policy, frames, quantizer, bits=(8,))
    exact, _ = exact_costs(sweep_of(policy, frames, quantizer, (8,)), block=32)
    reached = first[:, 0] > 1e-8
    np.testing.assert_allclose(first[reached], exact[reached], rtol=0.05)


def test_sketched_costs_are_unbiased(policy, frames, quantizer):
    full, _ = costs_of(policy, frames, quantizer, bits=(2,))
    sketched, _ = costs_of(policy, frames, quantizer, bits=(2,), probes=2000)
    reached = full > 1e-9
    # The relative standard deviation of one probe is at most sqrt(2), so here sqrt(2 / 2000 / 5).
    np.testing.assert_allclose(sketched[reached], full[reached], rtol=6 * np.sqrt(2 / 2000))


def test_probes_follow_the_seed_and_the_frame_alone(policy, frames, quantizer):
    kwargs = {"bits": (4,), "probes": 3}
    first, _ = costs_of(policy, frames, quantizer, batch=2, **kwargs)
    again, _ = costs_of(policy, frames, quantizer, batch=4, **kwargs)
    other, _ = costs_of(policy, frames, quantizer, seed=1, batch=4, **kwargs)
    np.testing.assert_allclose(first, again, rtol=1e-5)
    assert not np.allclose(first, other, rtol=1e-2)


def test_every_mesh_gives_the_same_costs(policy, frames, quantizer, one_device):
    expected, _ = costs_of(policy, frames, quantizer, mesh=one_device)
    for channel, split in ((1, False), (2, False), (2, True)):
        found, _ = costs_of(
            policy, frames, quantizer, mesh=sweep_mesh(channel), split_weights=split
        )
        # Split weights are summed over in another order.
        np.testing.assert_allclose(found, expected, rtol=1e-4 if split else 1e-6, atol=1e-12)


def test_layers_that_no_action_reads_cost_nothing(policy, frames, index, quantizer):
    costs, error = costs_of(policy, frames, quantizer)
    for layer, rows in index.items():
        if layer.path == UNREACHED:
            assert not costs[rows].any()
            assert not error[rows].any()
        else:
            assert costs[rows].any()


def test_standard_error_is_that_of_the_mean_over_frames(policy, quantizer):
    singles = []
    for number in range(4):
        frame = ToyFrames(4)
        frame.frames = 1
        frame.arrays = {k: v[number : number + 1] for k, v in frame.arrays.items()}
        singles.append(costs_of(policy, frame, quantizer)[0])
    mean, error = costs_of(policy, ToyFrames(4), quantizer)
    np.testing.assert_allclose(mean, np.mean(singles, axis=0), rtol=1e-5, atol=1e-14)
    np.testing.assert_allclose(error, np.std(singles, axis=0, ddof=1) / 2, rtol=1e-3, atol=1e-10)


def test_weights_of_action_dimensions(policy, frames, quantizer):
    parts = [
        costs_of(policy, frames, quantizer, weights=np.eye(3, dtype=np.float32)[i])[0]
        for i in range(3)
    ]
    whole, _ = costs_of(policy, frames, quantizer, weights=np.asarray([1.0, 2.0, 0.5], np.float32))
    np.testing.assert_allclose(
        whole, parts[0] + 2 * parts[1] + 0.5 * parts[2], rtol=1e-4, atol=1e-12
    )


def test_taylor_is_the_product_of_two_norms(policy, frames, index, layers, quantizer):
    costs, _ = costs_of(policy, frames, quantizer, method="taylor")
    for layer, rows in index.items():
        weight = layers[layer.path].kernel[...].T
        norms = [float(jnp.sum((on_grid(weight, b, grid="fitted") - weight)[0] ** 2)) for b in BITS]
        # The ratio of two bit-widths is that of the weight errors alone.
        first = costs[rows][0]
        if first[0] > 0:
            np.testing.assert_allclose(first / first[0], np.divide(norms, norms[0]), rtol=1e-4)


@pytest.mark.parametrize("probes", [0, -1, "all", True])
def test_unusable_probes_are_refused(policy, frames, quantizer, probes):
    with pytest.raises(InputError, match="probes"):
        costs_of(policy, frames, quantizer, probes=probes)


def test_an_activation_that_is_not_finite_names_the_frame(policy, quantizer):
    frames = ToyFrames(4)
    frames.arrays["text"][2, 0, 0] = np.inf
    with pytest.raises(InputError, match="calibration frame 2"):
        costs_of(policy, frames, quantizer)
