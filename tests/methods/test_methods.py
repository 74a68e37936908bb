"""Every row end to end: packed, counted, saved, loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qvla_jax
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import policy_index
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.methods import (
    RECIPES,
    InputMoments,
    Measurements,
    SweepSettings,
    check_setting,
    input_moments,
    quantize_by,
)
from qvla_jax.models.surgery import get_module
from qvla_jax.quantization import InputStatistics, LayerRules, option_sizes, row_bytes, stored_bytes
from qvla_jax.quantization.quantizer import UNIFORM_BASELINE
from qvla_jax.sensitivity import SensitivityTable
from qvla_jax.sensitivity.instrument import hooked_call

# A width or group for each published method and two of ours, so that together they cover what files
# hold.
ROWS = (
    "rtn-w8a8",
    "rtn-w4-g16",
    "gptq-w3",
    "awq-w4-g16",
    "smoothquant-w4a4",
    "omniquant-w3",
    "bitvla-w2a8",
    "hbvla-w1",
    "qvla-w9",
    "qvla-released-w6",
    "aware-w3a8",
    "action-rotated-w9a4",
    "action-activations-w9a6",
    "action-gripper-w9",
)
# Few layers, with and without biases, joined and alone.
RULES = LayerRules(
    include=(
        r"language_model\.model\.layers\.0\.self_attn\.[qkv]_proj",
        r"vision_backbone\.featurizer\.blocks\.0\.attn\.proj",
    )
)
# qwix's GPTQ compiles anew for every input, packing for every number of rows.
ONE = LayerRules(include=(r"vision_backbone\.featurizer\.blocks\.0\.attn\.proj",))


def test_there_is_a_row_of_every_method():
    ours = {name for name, recipe in RECIPES.items() if not callable(recipe.quantizer)}
    assert {check_setting(name).method for name in ROWS} | ours == set(RECIPES)


def test_moments_are_those_of_the_inputs(policy, calibration):
    index = policy_index(policy)
    moments = input_moments(policy, calibration, index, batch=3)
    seen: dict[str, list[np.ndarray]] = {path: [] for path in index.paths}

    graphdef, state = nnx.split(policy.model)

    @jax.jit
    def inputs_of_layers(state, inputs):
        found = {path: [] for path in index.paths}

        def hook(path, x, y):
            found[path].append(x.reshape(-1, x.shape[-1]))
            return y

        hooked_call(graphdef, state, (inputs,), index.paths, hook)
        return found

    for batch in calibration.batches(5):
        found = inputs_of_layers(state, jax.tree.map(jnp.asarray, policy.prepare(batch)))
        for path, calls in found.items():
            seen[path] += [np.asarray(x, np.float64) for x in calls]
    assert set(moments) == set(index.paths)
    for path, own in moments.items():
        x = np.concatenate(seen[path])
        scale = np.sqrt(np.mean(x**2, axis=0))
        np.testing.assert_allclose(
            own.hessian / len(x), x.T @ x / len(x), atol=1e-4 * np.outer(scale, scale).max()
        )
        np.testing.assert_allclose(own.mean_magnitude, np.abs(x).mean(axis=0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(own.largest, np.abs(x).max(axis=0), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def measured(policy, calibration):
    return drawn(policy, calibration, RULES)


def drawn(policy, calibration, rules):
    """With random inputs, whose ranges differ as those of transformers do.

    Of sensitivities the two forms of QVLA alone measure theirs; the others' are drawn.
    """
    rng = np.random.default_rng(0)
    index = policy_index(policy, rules)
    found, means, covariances = {}, {}, {}
    for layer in index.layers:
        x = rng.normal(size=(200, layer.fan_in)) * np.exp(rng.normal(size=layer.fan_in))
        found[layer.path] = InputMoments(x.T @ x, np.abs(x).mean(axis=0), np.abs(x).max(axis=0))
        means[layer.path], covariances[layer.path] = x.mean(axis=0), np.cov(x.T, bias=True)
    each = np.exp(2 * rng.normal(size=len(index)))
    result = Measurements(
        policy, calibration, rules=rules, moments=found, sweep=SweepSettings(probes=2)
    )
    real = result.table

    def statistics(weighting):
        return InputStatistics(means, covariances, weighting=weighting)

    def table(method, quantizer, options, joint, weights=None):
        if quantizer == UNIFORM_BASELINE:
            return real(method, quantizer, options, joint)
        return SensitivityTable(
            costs=each[:, None] * np.where(np.array(options) == 16, 0, 4.0 ** -np.array(options)),
            sizes=option_sizes(index, options, bias_correction=quantizer.bias_correction),
            bits=options,
            index=index,
            method=method,
            settings=quantizer,
            statistics=statistics(quantizer.weighting),
        )

    result.statistics, result.table = statistics, table
    return result


def test_what_was_measured_is_kept(policy, calibration, tmp_path, monkeypatch):
    args = "jacobian", UNIFORM_BASELINE, (0, 2, 4, 8, 16), False
    first = Measurements(
        policy, calibration, rules=RULES, sweep=SweepSettings(probes=2), folder=tmp_path
    )
    drawn_statistics = drawn(policy, calibration, RULES).statistics("action")
    module = Measurements.__module__
    monkeypatch.setattr(f"{module}.input_statistics", lambda *_, **__: drawn_statistics)
    costs, means = first.table(*args).costs, first.statistics("action").means
    for name in ("sensitivities", "input_statistics"):
        monkeypatch.setattr(f"{module}.{name}", lambda *_, **__: pytest.fail("measured again"))
    again = Measurements(
        policy, calibration, rules=RULES, sweep=SweepSettings(probes=2), folder=tmp_path
    )
    np.testing.assert_array_equal(again.table(*args).costs, costs)
    for path, mean in again.statistics("action").means.items():
        np.testing.assert_array_equal(mean, means[path])
        np.testing.assert_allclose(mean, drawn_statistics.means[path])
    other = Measurements(
        policy, calibration, rules=RULES, sweep=SweepSettings(probes=3), folder=tmp_path
    )
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        other.table(*args)


def counted_bytes(loaded, index, setting):
    """By the rules of allocations, and 2 bytes for each input's factor."""
    if RECIPES[setting.method].allocates:
        layers = packed_layers(loaded.model)
        bits = np.concatenate([layers[path].weight.bits() for path in index.paths])
        assert len(set(bits.tolist())) > 1
        corrected = setting.method not in ("qvla", "qvla-released")
        counted = stored_bytes(index, bits, bias_correction=corrected)
        if setting.method != "qvla-released":
            assert counted <= setting.bits * index.num_weights / 8
        else:
            assert setting.bits - 1 < bits.mean() <= setting.bits
        return counted
    factors = 2 if setting.method in ("awq", "smoothquant") else 0
    return sum(
        layer.out_features
        * row_bytes(
            layer.fan_in,
            16 if setting.method == "hbvla" else int(setting.bits),
            bias=layer.has_bias,
            permuted=False,
            source_bytes=layer.source_bytes,
            group=setting.group,
        )
        + factors * layer.fan_in
        for layer in index.layers
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_row_stores_what_is_counted_and_its_layers_are_those_in_float(
    policy, calibration, measured, name, tmp_path
):
    setting = check_setting(name)
    rules = RULES
    if setting.method == "gptq":
        rules = ONE
        measured = Measurements(policy, calibration, rules=ONE, moments=measured.moments)
    path = tmp_path / f"{name}.qvla"
    quantize_by(policy, calibration, name, measured=measured).save(path)
    loaded = qvla_jax.load_policy(path)
    assert loaded.quantization["method"] == name
    assert loaded.quantization["policy fingerprint"] == policy.fingerprint
    index = policy_index(policy, rules)
    assert PackedFile(path).packed_bytes == counted_bytes(loaded, index, setting)

    in_float = unpacked(policy, loaded)
    layers = packed_layers(loaded.model)
    assert set(layers) == set(index.paths)
    rounded = {layer.inputs.activation_bits for layer in layers.values()}
    if RECIPES[setting.method].activations == "allocated":
        assert rounded <= {4, 8, 16}
        assert min(rounded) < setting.activation_bits
    else:
        assert rounded == {setting.activation_bits}
    for layer_path, layer in layers.items():
        assert (layer.inputs.scale is not None) == (setting.method in ("awq", "smoothquant"))
        x = jax.random.normal(jax.random.key(0), (7, layer.weight.shape[1]))
        exact, ran = get_module(policy.model, layer_path)(x), layer(x)
        error = np.abs(ran - exact).max()
        assert 0 < error < np.abs(exact).max()
        expected = get_module(in_float.model, layer_path)(x)
        np.testing.assert_allclose(ran, expected, atol=max(2e-3, 0.1 * error))


def test_layers_that_no_forward_pass_reaches_are_rounded_to_nearest(policy, calibration):
    nothing = Measurements(policy, calibration, rules=RULES, moments={})
    found, plain = (
        packed_layers(quantize_by(policy, calibration, name, measured=nothing).model)
        for name in ("gptq-w3", "rtn-w3")
    )
    assert found.keys() == plain.keys()
    for path, layer in found.items():
        same = jax.tree.map(np.array_equal, layer.weight, plain[path].weight)
        assert jax.tree.all(same)


@pytest.mark.parametrize("method", ["action-layers", "action-uncorrected", "action-three"])
def test_allocations_take_the_recipe_s_options_within_the_budget(policy, calibration, method):
    recipe, measured = RECIPES[method], drawn(policy, calibration, ONE)
    packed = quantize_by(policy, calibration, f"{method}-w9", measured=measured)
    layers = packed_layers(packed.model)
    index = policy_index(policy, ONE)
    bits = [layers[path].weight.bits() for path in index.paths]
    assert {int(b) for own in bits for b in own} <= set(recipe.options)
    assert (len(set(bits[0].tolist())) == 1) == (recipe.unit == "layer")
    corrected = recipe.quantizer.bias_correction
    size = stored_bytes(index, np.concatenate(bits), bias_correction=corrected)
    assert size <= 9 * index.num_weights / 8
    assert (layers[index.paths[0]].weight.bias is not None) == (
        corrected or index.layers[0].has_bias
    )


def test_a_budget_below_the_smallest_option_is_refused(policy, calibration, measured):
    with pytest.raises(BudgetError):
        quantize_by(policy, calibration, "action-unpruned-w1", measured=measured)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gptq", "expected METHOD-wBITS"),
        ("gptk-w4", "did you mean gptq"),
        ("gptq-w5", "weights of 2, 3, 4, 8 bits"),
        ("bitvla-w3", "weights of 2 bits"),
        ("gptq-w4a7", r"activations have \(16, 8, 4\) bits"),
        ("rtn-w4a4.5", r"activations have \(16, 8, 4\) bits"),
        ("action-activations-w4", "nothing to allocate"),
        ("smoothquant-w4", "give a8 or a4"),
        ("qvla-w4-g32", "one scale for each channel"),
        ("qvla-w17", "at most 16 bits"),
        ("rtn-w4-g100", "multiple of 16"),
    ],
)
def test_wrong_names_are_refused(policy, calibration, name, message):
    with pytest.raises(InputError, match=message):
        quantize_by(policy, calibration, name)


def test_a_quantized_policy_is_refused(policy, calibration):
    quantized = quantize_by(policy, calibration, "rtn-w4", rules=RULES)
    with pytest.raises(InputError, match="quantized already"):
        quantize_by(quantized, calibration, "rtn-w4")
