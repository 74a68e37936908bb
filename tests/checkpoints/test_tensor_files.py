"""Mapped tensors: one open file for all of them, and memory that is given back."""

import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qvla_jax.checkpoints.tensor_files import TensorFile
from qvla_jax.mapping import region_of, release_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")


@pytest.fixture
def stored(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.normal(size=(3, 1 + i)).astype(np.float32) for i in range(200)}
    safetensors.numpy.save_file(tensors, tmp_path / "small.safetensors")
    return tensors, TensorFile(tmp_path / "small.safetensors")


def test_every_tensor_is_a_read_only_view_of_its_bytes(stored):
    tensors, file = stored
    for name, expected in tensors.items():
        found = file[name]
        np.testing.assert_array_equal(found, expected)
        assert not found.flags.writeable
        assert region_of(found.T[..., 0]) is region_of(found)
    assert region_of(np.array(found)) is None


@linux
def test_all_tensors_of_a_file_take_no_more_open_files_than_one(stored):
    tensors, file = stored
    held = [file[name] for name in tensors]
    links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    assert sum(target.endswith("small.safetensors") for target in targets) == 1
    assert len(held) == 200


@linux
def test_what_was_read_leaves_memory_when_it_is_released_and_with_its_last_array(tmp_path):
    size = 1 << 24
    tensors = {name: np.ones(size, np.uint8) for name in "ab"}
    safetensors.numpy.save_file(tensors, tmp_path / "large.safetensors")
    file = TensorFile(tmp_path / "large.safetensors")

    def read_of_file() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith("large.safetensors"))
        return 1024 * int(next(x for x in lines[at:] if x.startswith("Rss:")).split()[1])

    held = file["a"]
    assert held.sum(dtype=int) == size
    assert read_of_file() >= size
    release_pages(held)
    assert read_of_file() < size // 4
    assert held.sum(dtype=int) == size  # and comes back
    view = held[1:].reshape(3, -1)
    del held
    assert read_of_file() >= size
    del view
    assert read_of_file() < size // 4


def test_device_arrays_outlive_the_file(stored):
    tensors, file = stored
    placed = jnp.asarray(file["t7"])
    del file
    np.testing.assert_array_equal(placed, tensors["t7"])
