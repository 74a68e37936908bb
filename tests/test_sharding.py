"""Batches on a mesh of two virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvla_jax import devices, sharding
from qvla_jax.commands.sensitivity import Config
from qvla_jax.errors import InputError


def test_a_batch_is_split_over_all_devices():
    mesh = sharding.data_mesh()
    assert mesh.shape == {"data": 2}
    tree = sharding.shard_batch(mesh, {"x": np.arange(12.0).reshape(4, 3), "n": np.arange(4)})
    assert {s.data.shape for s in tree["x"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(tree["x"], np.arange(12.0).reshape(4, 3))


def test_a_batch_that_does_not_divide_is_replicated():
    tree = sharding.shard_batch(sharding.data_mesh(), np.arange(3))
    assert {s.data.shape for s in tree.addressable_shards} == {(3,)}


def test_padding_repeats_the_last_entry():
    padded, count = sharding.pad_batch({"x": np.arange(3), "y": np.eye(3)}, 2)
    assert count == 3
    np.testing.assert_array_equal(padded["x"], [0, 1, 2, 2])
    assert padded["y"].shape == (4, 3)


def test_a_sharded_sum_equals_the_plain_one():
    mesh = sharding.data_mesh()
    x = np.arange(8.0, dtype=np.float32)
    weights = sharding.replicate(mesh, jnp.float32(2))
    result = jax.jit(lambda w, b: jnp.sum(w * b))(weights, sharding.shard_batch(mesh, x))
    assert float(result) == 56.0


def test_asking_for_cores_after_the_devices_exist_changes_nothing():
    before = len(jax.devices())
    devices.use_all_cpu_cores()
    assert len(jax.devices()) == before
    assert devices.cores() >= 1


def test_a_process_that_no_cluster_started_is_told_what_to_name(monkeypatch, tmp_path):
    def initialize(**settings):
        assert settings.keys() == {"heartbeat_timeout_seconds"}
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match=r"address should be defined.*SLURM.*--coordinator"):
        sharding.join_cluster()
    assert Config(out=tmp_path, distributed=True).joins
    with pytest.raises(InputError, match="drop one of the two"):
        Config(out=tmp_path, distributed=True, coordinator="a:1")
