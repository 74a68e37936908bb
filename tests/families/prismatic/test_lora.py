"""PEFT adapter folders, merged as each weight is read."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.lora import merge_adapter

RANK = 4
PREFIX = "base_model.model."


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "mlp.weight": rng.normal(size=(6, 5)).astype(np.float32),
        "patch.weight": rng.normal(size=(6, 3, 2, 2)).astype(np.float32),
        "norm.weight": rng.normal(size=6).astype(np.float32),
    }


def halves() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {
        "mlp.lora_A.weight": (RANK, 5),
        "mlp.lora_B.weight": (6, RANK),
        "patch.lora_A.weight": (RANK, 3, 2, 2),
        "patch.lora_B.weight": (6, RANK, 1, 1),
    }
    return {f"{PREFIX}{n}": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    settings = {"r": RANK, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2 / RANK), (True, 2 / RANK**0.5)])
def test_weights_gain_the_scaled_product(tmp_path, rslora, scale):
    base, low = weights(), halves()
    merged = merge_adapter(base, write(tmp_path / "a", low, use_rslora=rslora))
    assert list(merged) == list(base)
    assert len(merged) == 3
    low = {name: tensor.astype(np.float64) for name, tensor in low.items()}
    product = low[f"{PREFIX}mlp.lora_B.weight"] @ low[f"{PREFIX}mlp.lora_A.weight"]
    np.testing.assert_allclose(
        merged["mlp.weight"], base["mlp.weight"] + scale * product, rtol=1e-5, atol=1e-6
    )
    product = np.einsum(
        "cr,rijk->cijk",
        low[f"{PREFIX}patch.lora_B.weight"][..., 0, 0],
        low[f"{PREFIX}patch.lora_A.weight"],
    )
    np.testing.assert_allclose(
        merged["patch.weight"], base["patch.weight"] + scale * product, rtol=1e-5, atol=1e-6
    )
    assert merged["norm.weight"] is base["norm.weight"]


def test_merged_weights_keep_their_dtype(tmp_path):
    base = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights().items()}
    merged = merge_adapter(base, write(tmp_path / "a", halves()))
    assert {tensor.dtype for tensor in merged.values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"mlp": (4, 2 / 4), "patch": (4, 2 / 4)}),
        ({"alpha_pattern": {"mlp": 6}}, {"mlp": (4, 6 / 4), "patch": (4, 2 / 4)}),
        ({"alpha_pattern": {"m.p": 6}, "use_rslora": True}, {"mlp": (4, 3), "patch": (4, 1)}),
        ({"rank_pattern": {"patch": 2}}, {"mlp": (4, 2 / 4), "patch": (2, 2 / 2)}),
        (
            {"rank_pattern": {"patch|x": 2}, "alpha_pattern": {"patch|x": 3, ".*": 5}},
            {"mlp": (4, 5 / 4), "patch": (2, 3 / 2)},
        ),
    ],
    ids=str,
)
def test_patterns_give_layers_their_own_rank_and_alpha(tmp_path, settings, expected):
    base, low = weights(), {}
    rng = np.random.default_rng(2)
    for layer, (rank, _) in expected.items():
        channels, *inputs = base[f"{layer}.weight"].shape
        a = rng.normal(size=(rank, *inputs)).astype(np.float32)
        b = rng.normal(size=(channels, rank, *[1] * (len(inputs) - 1))).astype(np.float32)
        low |= {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
    merged = merge_adapter(base, write(tmp_path / "a", low, **settings))
    for layer, (rank, scale) in expected.items():
        a, b = (low[f"{PREFIX}{layer}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        product = np.tensordot(b.reshape(-1, rank), a, 1)
        weight = base[f"{layer}.weight"] + scale * product
        np.testing.assert_allclose(merged[f"{layer}.weight"], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"mlp": 4}, "alpha_pattern": {"m.p": 4}}, "versions of PEFT differ"),
        ({"rank_pattern": {"mlp": 3}}, r"lora_A.weight' has shape \(4, 5\), expected \(3, 5\)"),
        ({"rank_pattern": {"mlp": 0}}, "'mlp': 0 is no rank"),
        ({"alpha_pattern": {"mlp": "x"}}, "'mlp': 'x' is no number"),
        ({"alpha_pattern": {"(": 3}}, r"'\(' is no expression"),
        ({"alpha_pattern": [3]}, r"'alpha_pattern' is \[3\], expected an object"),
        (
            {"target_modules": ["mlp"]},
            r"'target_modules' is \['mlp'\], which does not name 'patch'",
        ),
        ({"target_modules": "m.*"}, "'target_modules' is 'm.*', which does not name 'patch'"),
        ({"r": True}, "'r': True is no rank"),
        ({"use_rslora": "yes"}, "'use_rslora' is 'yes', expected a bool"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(weights(), write(tmp_path / "a", halves(), **settings))


MLP = f"{PREFIX}mlp"
PATCH = f"{PREFIX}patch"


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{MLP}.lora_A.weight"),
            rf"{MLP}.lora_A.weight' of shape \(4, 5\) is miss",
        ),
        (
            lambda t: t.pop(f"{MLP}.lora_B.weight"),
            rf"{MLP}.lora_B.weight' of shape \(6, 4\) is miss",
        ),
        (
            lambda t: t.update({f"{MLP}.lora_A.weight": zeros(4, 6)}),
            rf"{MLP}.lora_A.weight' has shape \(4, 6\), expected \(4, 5\)",
        ),
        (
            lambda t: t.update({f"{MLP}.lora_A.weight": zeros(3, 5)}),
            rf"{MLP}.lora_A.weight' has shape \(3, 5\), expected \(4, 5\)",
        ),
        (
            lambda t: t.update({f"{PATCH}.lora_B.weight": zeros(6, 4)}),
            rf"{PATCH}.lora_B.weight' has shape \(6, 4\), expected \(6, 4, 1, 1\)",
        ),
        (
            lambda t: t.update({f"{PREFIX}x.lora_A.weight": zeros(4, 5)}),
            r"x.lora_A.weight' of shape \(4, 5\) is unexpected: there is no 'x.weight'",
        ),
        (
            lambda t: t.update({f"{MLP}.lora_magnitude_vector": zeros(6)}),
            rf"{MLP}.lora_magnitude_vector' of shape \(6,\) is unexpected",
        ),
        (
            lambda t: t.update({f"{MLP}.bias": zeros(6)}),
            rf"{MLP}.bias' of shape \(6,\) is unexpected",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(tmp_path, change, message):
    low = halves()
    change(low)
    with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors: tensor '.*{message}"):
        merge_adapter(weights(), write(tmp_path / "a", low))


def test_a_damaged_folder_is_named(tmp_path):
    folder = write(tmp_path / "a", halves())
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a/adapter_config\.json: 'r', the rank, is missing"):
        merge_adapter(weights(), folder)
