"""The device mesh for batched work, and how batches are put on it.

One axis, `data`: every local device takes an equal share of a batch, and weights are replicated. On
CPU one XLA device uses about one core, so `use_all_cpu_cores` makes a virtual device of each.
"""

import contextlib
import os
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"

Tree = TypeVar("Tree")


def use_all_cpu_cores() -> int:
    """Makes as many virtual CPU devices as this process may use cores.

    Must run before the first use of a device; afterwards it changes nothing, as JAX's backends are
    fixed then.

    Returns:
        The number of CPU devices asked for.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    # JAX refuses the setting once its devices exist; whoever made them has decided their number.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cores)
    return cores


def data_mesh() -> Mesh:
    """Returns a mesh over all local devices, with the single axis `data`."""
    return Mesh(np.asarray(jax.local_devices()), (DATA_AXIS,))


def shard_batch(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a batch on the mesh, its first axis split over the devices.

    Args:
        mesh: A mesh with an axis `data`.
        tree: Arrays that share their first axis, `[b, ...]`. Where `b` is not a multiple of the
            number of devices, the array is replicated instead: the result is the same, only slower.

    Returns:
        The same tree, as JAX arrays.
    """
    devices = mesh.shape[DATA_AXIS]

    def put(leaf: Any) -> jax.Array:
        divisible = np.ndim(leaf) > 0 and np.shape(leaf)[0] % devices == 0
        spec = PartitionSpec(DATA_AXIS) if divisible else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a whole copy of `tree` on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def pad_batch(tree: Tree, multiple: int) -> tuple[Tree, int]:
    """Repeats the last entry of a batch until its length is a multiple of `multiple`.

    Returns:
        The padded tree (numpy) and the original length.
    """
    count = len(jax.tree.leaves(tree)[0])
    extra = -count % multiple

    def pad(leaf: Any) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], extra, axis=0)]) if extra else leaf

    return jax.tree.map(pad, tree), count
