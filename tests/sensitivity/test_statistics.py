"""Moments of the inputs, and the released code's proxy against its recorded outputs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.models import get_module
from qvla_jax.quantization import InputStatistics, Quantizer, QuantizerSettings
from qvla_jax.sensitivity import input_statistics
from qvla_jax.sensitivity.input_hessian import (
    input_hessians,
    inverse_factor_diagonal,
    proxy_costs,
    released_grid,
)

from .toys import LLM, UNREACHED, ToyFrames, take_inputs

RELEASE = np.load(Path(__file__).parent / "fixtures" / "qvla_release.npz")
LAYERS = ("llm", "down", "vision", "patch")
FIRST_TOWER = "vision_backbone.featurizer.blocks.0.fc"
FIRST_LLM = "language_model.model.layers.0.attn"


def test_means_are_those_of_all_frames_cameras_and_tokens(policy, index):
    frames = ToyFrames(5, padding=False)
    found = input_statistics(policy, frames, index, batch=2)
    means = found.means
    images = frames.arrays["image"].astype(np.float64)
    np.testing.assert_allclose(means[FIRST_TOWER], images.mean(axis=(0, 1, 2)), rtol=1e-5)
    flat = images.reshape(-1, images.shape[-1])
    np.testing.assert_allclose(
        found.covariances[FIRST_TOWER], np.cov(flat.T, bias=True), rtol=1e-4, atol=1e-6
    )
    assert means[LLM].dtype == np.float64
    # Both towers see the same pixels, but the llm's layers do not.
    assert found.covariances[LLM].shape == (12, 12)
    assert not means[UNREACHED].any()


def test_batch_size_and_devices_do_not_change_the_means(policy, index, frames):
    first = input_statistics(policy, frames, index, batch=2).means
    second = input_statistics(policy, frames, index, batch=5).means
    for path, mean in first.items():
        np.testing.assert_allclose(mean, second[path], rtol=1e-5, atol=1e-7)


def test_padding_does_not_count(policy, index):
    frames = ToyFrames(4)
    means = input_statistics(policy, frames, index).means
    # Whatever stands in the padding.
    for frame, length in enumerate(frames.arrays["length"].astype(int)):
        frames.arrays["text"][frame, length - 6 :] = 50.0
    padded = input_statistics(policy, frames, index).means
    for path, mean in means.items():
        np.testing.assert_allclose(mean, padded[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_factor_of_the_recorded_covariance(layer):
    found = inverse_factor_diagonal(RELEASE[f"{layer}/H"])
    np.testing.assert_allclose(found, RELEASE[f"{layer}/diag_hinv"], rtol=2e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_released_grid(layer, bits):
    found = released_grid(RELEASE[f"{layer}/weight"], bits)
    np.testing.assert_allclose(found, RELEASE[f"{layer}/quantize_row_sym_{bits}"], rtol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_released_proxy(layer):
    bits = (0, 2, 4, 8, 16)
    diagonal = inverse_factor_diagonal(RELEASE[f"{layer}/H"])
    found = proxy_costs(RELEASE[f"{layer}/weight"], diagonal, bits)
    expected = np.stack([RELEASE[f"{layer}/proxy_{b}"] for b in bits], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)
    assert not found[:, -1].any()


@pytest.mark.parametrize("layer", ["llm", "vision"])
def test_the_recorded_covariance_is_two_over_n_times_the_sum(layer):
    calls = [RELEASE[key] for key in RELEASE.files if key.startswith(f"{layer}/input_")]
    n = sum(len(call) for call in calls)
    assert n == RELEASE[f"{layer}/nsamples"]
    total = sum(np.einsum("btj,btk->jk", c, c, dtype=np.float64) for c in calls)
    np.testing.assert_allclose(RELEASE[f"{layer}/H"], 2 / n * total, rtol=1e-5, atol=1e-4)


def test_covariances_through_the_model(sweep, frames):
    found = input_hessians(dataclasses.replace(sweep, batch=2))
    images = frames.arrays["image"].astype(np.float64)
    expected = 2 / 5 * np.einsum("bvtj,bvtk->jk", images, images)
    np.testing.assert_allclose(found[FIRST_TOWER], expected, rtol=1e-5)
    assert found[FIRST_LLM].shape == (12, 12)
    assert not found[UNREACHED].any()


def test_statistics_round_trip_and_are_read_layer_by_layer(policy, index, frames, tmp_path):
    found = input_statistics(policy, frames, index)
    found.save(tmp_path / "s.safetensors")
    loaded = InputStatistics.load(tmp_path / "s.safetensors")
    assert (loaded.made_from, loaded.weighting) == (found.made_from, "tokens")
    assert set(loaded.covariances) == set(found.covariances) == set(index.paths)
    for path, mean in found.means.items():
        np.testing.assert_array_equal(loaded.means[path], mean)
        expected = found.covariance(path).astype(np.float32)
        np.testing.assert_array_equal(loaded.covariance(path), expected)


def test_damaged_statistics_are_refused(policy, index, frames, tmp_path):
    path = tmp_path / "s.safetensors"
    input_statistics(policy, frames, index).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"s\.safetensors: not input statistics"):
        InputStatistics.load(path)
    with pytest.raises(InputError, match="no such file"):
        InputStatistics.load(tmp_path / "other.safetensors")


def action_error_of_a_row(policy, frames, path, change, shift):
    """Sum over rows and mean over frames of || dA ||^2 where one row and its bias change so."""
    graphdef, state = nnx.split(policy.model)
    inputs = take_inputs(frames.whole())
    linear = get_module(policy.model, path)
    kernel = linear.kernel[...]
    start = jnp.zeros(kernel.shape[1]) if linear.bias is None else linear.bias[...]

    def action(kernel, bias):
        model = nnx.merge(graphdef, state)
        linear = get_module(model, path)
        linear.kernel, linear.bias, linear.use_bias = nnx.Param(kernel), nnx.Param(bias), True
        return model(inputs)

    def of_row(row):
        dw, db = jnp.asarray(change, jnp.float32)[:, None] * row[None], shift * row
        return jnp.sum(jnp.square(jax.jvp(action, (kernel, start), (dw, db))[1]))

    rows = jax.jit(jax.vmap(of_row))(jnp.eye(kernel.shape[1]))
    return float(rows.sum()) / frames.frames


@pytest.mark.parametrize("path", [LLM, FIRST_TOWER])
def test_moments_by_action_are_the_action_s_error_of_a_changed_row(policy, index, path):
    frames = ToyFrames(40)
    found = input_statistics(policy, frames, index, weighting="action")
    mean, covariance = found.means[path], found.covariances[path]
    second = covariance + np.outer(mean, mean)
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(4):
        change, shift = rng.normal(size=len(mean)), rng.normal()
        form = change @ second @ change + 2 * shift * change @ mean + shift**2
        ratios.append(form / action_error_of_a_row(policy, frames, path, change, shift))
    # The one factor of all changes is the scale of H; probes are random.
    np.testing.assert_allclose(ratios, np.mean(ratios), rtol=0.1)
    # No shift of the bias makes the error of a change smaller than the mean's.
    change = rng.normal(size=len(mean))
    best = -float(change @ mean)
    errors = [action_error_of_a_row(policy, frames, path, change, best + d) for d in (-1, 0, 1)]
    assert errors[1] < min(errors[0], errors[2])


def test_rounding_wants_statistics_of_its_weighting(policy, index, frames):
    statistics = input_statistics(policy, frames, index)
    quantizer = Quantizer(QuantizerSettings(weighting="action"), statistics)
    with pytest.raises(InputError, match=r"weighted by tokens.*want action"):
        quantizer.check(index)
