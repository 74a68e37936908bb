"""Streaming import, and what comes back from orbax."""

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from qvla_jax import cli
from qvla_jax.checkpoints import public_tensors
from qvla_jax.checkpoints.orbax_weights import load_orbax, save_orbax
from qvla_jax.checkpoints.weights import flax_leaves, public_shapes
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.prismatic.checkpoint.directory import PublicTensors
from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.network import abstract_model
from qvla_jax.inference import import_policy, load_policy
from qvla_jax.report.modules import describe
from qvla_jax.sharding import data_mesh

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    path = tmp_path_factory.mktemp("public") / "oft"
    zipfile.ZipFile(FIXTURES / "openvla_oft_film_tiny.zip").extractall(path)
    return path


@pytest.fixture(scope="module")
def imported(public, tmp_path_factory):
    path = tmp_path_factory.mktemp("imported") / "oft"
    import_policy(public, path, dtype=jnp.float32)
    return path


def test_an_imported_directory_loads_as_the_public_one(public, imported):
    expected, found = load_policy(public), load_policy(imported)
    assert found.config == expected.config
    tensors = public_tensors(found.model)
    for name, tensor in public_tensors(expected.model).items():
        assert tensor.tobytes() == tensors[name].tobytes(), name
    assert found.fingerprint == expected.fingerprint


def test_orbax_alone_reads_the_tree(public, imported):
    stored = ocp.PyTreeCheckpointer().restore(imported / "weights")
    source = PublicTensors(public)
    assert len(stored) == len(source)
    name = "language_model.model.layers.1.mlp.up_proj"
    np.testing.assert_array_equal(stored[f"{name}.kernel"], source[f"{name}.weight"].T)


def test_it_is_described_as_the_public_one(public, imported):
    expected, found = describe(str(public)), describe(str(imported))
    assert found.parameters == expected.parameters
    assert [m.channels for m in found.modules] == [m.channels for m in expected.modules]
    assert found.stored_bytes == 4 * found.parameters


def test_weights_are_cast_and_placed_as_asked(public, imported):
    mesh = data_mesh()
    assert mesh.size == 2
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for source in (public, imported):
        policy = load_policy(source, dtype=jnp.bfloat16, sharding=sharding)
        for variable in jax.tree.leaves(nnx.state(policy.model, nnx.Param)):
            assert variable.dtype == jnp.bfloat16
            assert variable.sharding.is_equivalent_to(sharding, variable.ndim)


def test_bfloat16_weights_act_as_the_same_values_in_float32(public, tmp_path):
    rounded, wide = tmp_path / "rounded", tmp_path / "wide"
    import_policy(public, rounded)
    policy = load_policy(rounded, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    observation = {
        "image": rng.integers(0, 256, (224, 224, 3), np.uint8),
        "wrist_image": rng.integers(0, 256, (224, 224, 3), np.uint8),
        "state": rng.uniform(-0.1, 0.1, 8).astype(np.float32),
        "instruction": "open the drawer",
    }
    policy.save(wide, dtype=jnp.float32)
    # Weights are promoted where they are used; the suite forbids that by default.
    with jax.numpy_dtype_promotion("standard"):
        narrow = policy.infer(observation, preprocessed=True)
    expected = load_policy(wide).infer(observation, preprocessed=True)
    np.testing.assert_allclose(narrow, expected, rtol=0, atol=1e-6)


def test_only_one_tensor_is_held_at_a_time(tmp_path):
    """Each tensor is asked for when the one before it lies on disk."""
    model = abstract_model(preset("tiny-test"))
    tensors = _tensors()
    written: list[int] = []

    class Watched(dict):
        def __getitem__(self, name):
            written.append(len(list(tmp_path.glob("*/*/.zarray"))))
            return super().__getitem__(name)

    save_orbax(tmp_path / "w", model, Watched(tensors), source="test")
    assert written == list(range(len(tensors)))


def _tensors(**changes):
    shapes = public_shapes(abstract_model(preset("tiny-test")))
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} | changes


def test_wrong_tensors_leave_nothing_behind(tmp_path):
    model = abstract_model(preset("tiny-test"))
    name = "language_model.model.norm.weight"
    for value, message in (
        (np.zeros(3, np.float32), r"norm.weight' has shape \(3,\), expected \(32,\)"),
        (np.full(32, np.nan, np.float32), "norm.weight' holds NaN or inf"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_orbax(tmp_path / "w", model, _tensors(**{name: value}), source="test")
        assert not (tmp_path / "w").exists()


def test_damaged_checkpoints_are_named(tmp_path):
    small = abstract_model(preset("tiny-test"))
    save_orbax(tmp_path / "w", small, _tensors(), source="test")
    leaf = "language_model.model.norm.scale"
    assert leaf in flax_leaves(small)
    # Another architecture.
    with pytest.raises(CheckpointError, match=r"parameter '.*' of shape .* is missing"):
        load_orbax(abstract_model(preset("libero-mini")), tmp_path / "w")
    del small.language_model.model.norm
    with pytest.raises(CheckpointError, match=rf"parameter '{leaf}' is unexpected"):
        load_orbax(small, tmp_path / "w")
    path = tmp_path / "w" / leaf / ".zarray"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"shape": [31]}))
    with pytest.raises(CheckpointError, match=rf"'{leaf}' has shape \(31,\), expected"):
        load_orbax(abstract_model(preset("tiny-test")), tmp_path / "w")
    path.write_text(whole[:20])
    named = f"parameter .{leaf}. cannot be read"
    with pytest.raises(CheckpointError, match=named):
        load_orbax(abstract_model(preset("tiny-test")), tmp_path / "w")
    path.write_text(whole)
    chunk = path.with_name("0")
    content = chunk.read_bytes()
    for at in range(0, len(content), 16):
        chunk.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=leaf):
            load_orbax(abstract_model(preset("tiny-test")), tmp_path / "w")
    chunk.write_bytes(content[:50])
    for sharding in (None, jax.sharding.SingleDeviceSharding(jax.devices()[0])):
        with pytest.raises(CheckpointError, match=named):
            load_orbax(abstract_model(preset("tiny-test")), tmp_path / "w", sharding=sharding)
    chunk.unlink()
    with pytest.raises(CheckpointError, match=named):
        load_orbax(abstract_model(preset("tiny-test")), tmp_path / "w")
    with pytest.raises(CheckpointError, match="not a readable orbax checkpoint"):
        load_orbax(abstract_model(preset("tiny-test")), tmp_path / "nowhere")


def test_the_command_says_where_and_how_much(public, imported, tmp_path, capsys):
    assert cli.main(["import", "--model", str(public), "--out", str(tmp_path / "out")]) == 0
    assert "peak resident memory" in capsys.readouterr().out
    assert load_policy(tmp_path / "out").config.use_film
    for source, out, message in (
        (imported, tmp_path / "other", "not a public directory"),
        (public, imported, "holds files already"),
    ):
        with pytest.raises(InputError, match=message):
            import_policy(source, out)
