"""The device meshes, and moving arrays to and from them.

Batched inference has one axis, `data`: every local device takes an equal share of a batch, and
weights are replicated. Sensitivity sweeps run on all devices of all processes and have a second
axis, `channel`, over which output channels are split. On CPU one XLA device uses about one core, so
`devices.use_all_cpu_cores` creates a virtual device for each.

Every process holds the same host arrays and calls the same functions in the same order (JAX's
multi-controller model); each puts the shards of its own devices.
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvla_jax.array_typing import AnyArray
from qvla_jax.errors import InputError

DATA_AXIS = "data"
CHANNEL_AXIS = "channel"
# After which the processes of a sweep take one for dead.
_HEARTBEAT_SECONDS = 30

Tree = TypeVar("Tree")


def data_mesh() -> Mesh:
    """Returns a mesh over all local devices, with the single axis `data`."""
    return Mesh(np.asarray(jax.local_devices()), (DATA_AXIS,))


def sweep_mesh(channel: int = 1) -> Mesh:
    """Returns a mesh over the devices of all processes, with the axes `data` and `channel`.

    Args:
        channel: devices along `channel`; all others lie along `data`.

    Raises:
        InputError: the number of devices is not a multiple of `channel`.
    """
    devices = np.asarray(jax.devices())
    if channel < 1 or len(devices) % channel:
        raise InputError(
            f"{channel} devices along the channel axis do not divide the {len(devices)} there are"
        )
    return Mesh(devices.reshape(-1, channel), (DATA_AXIS, CHANNEL_AXIS))


def one_device_mesh() -> Mesh:
    """Returns a mesh of the first local device, with the axes of `sweep_mesh`."""
    return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1), (DATA_AXIS, CHANNEL_AXIS))


def join_processes(coordinator: str, processes: int, process: int) -> None:
    """Joins the processes of a sweep, before the first use of a device.

    If one of them dies, the others exit as well, at the latest after the heartbeat timeout.

    Args:
        coordinator: HOST:PORT of process 0.
        processes: number of processes.
        process: which one this is.

    Raises:
        InputError: the number is out of range, or nothing answers at the address.
    """
    if not 0 <= process < processes or ":" not in coordinator:
        raise InputError(
            f"process {process} of {processes} at {coordinator!r}: expected HOST:PORT and a number "
            "from 0, below the number of processes"
        )
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"process {process} cannot join {coordinator}: {error}") from error


def join_cluster() -> None:
    """Like `join_processes`, with what JAX finds out from the cluster's environment.

    JAX knows Cloud TPU, SLURM, Kubernetes (GKE) and Open MPI.

    Raises:
        InputError: it finds none of them, or the processes do not come together.
    """
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes of this cluster cannot be joined ({error}): JAX finds them on Cloud "
            "TPU, under SLURM (srun), Kubernetes and Open MPI; elsewhere name them by "
            "--coordinator, --processes and --process"
        ) from error


def is_main_process() -> bool:
    """Whether this process is the one that writes results."""
    return jax.process_index() == 0


def put(mesh: Mesh, leaf: Any, spec: PartitionSpec) -> jax.Array:
    """Puts one array on the mesh; all processes pass the same values."""
    sharding = NamedSharding(mesh, spec)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(array: AnyArray) -> np.ndarray:
    """The whole array, on every process; all processes must call it."""
    if isinstance(array, np.ndarray):
        return array
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def from_main_process(data: bytes) -> bytes:
    """The main process's argument, on every process; all processes must call it."""
    if jax.process_count() == 1:
        return data
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # The other processes' arguments may have another length, and are ignored.
    buffer = np.frombuffer(data.ljust(length)[:length], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()


def largest_axis(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Splits a weight along its largest axis that `channel` divides; vectors are replicated."""
    devices = mesh.shape[CHANNEL_AXIS]
    axes = [i for i, size in enumerate(shape) if size % devices == 0]
    if len(shape) < 2 or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda i: shape[i])
    return PartitionSpec(*(CHANNEL_AXIS if i == largest else None for i in range(len(shape))))


def split_weights(mesh: Mesh, tree: Tree) -> Tree:
    """Puts weights on the mesh, each split over `channel` along its largest axis."""
    return jax.tree.map(lambda leaf: put(mesh, leaf, largest_axis(mesh, np.shape(leaf))), tree)


def shard_batch(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a batch on the mesh, its first axis split over the devices.

    Args:
        mesh: a mesh with an axis `data`.
        tree: arrays that share their first axis, `[b, ...]`. Where `b` is not a multiple of the
            number of devices, the array is replicated instead: the result is the same, only slower.

    Returns:
        The same tree, as JAX arrays.
    """
    devices = mesh.shape[DATA_AXIS]

    def place(leaf: Any) -> jax.Array:
        divisible = np.ndim(leaf) > 0 and np.shape(leaf)[0] % devices == 0
        return put(mesh, leaf, PartitionSpec(DATA_AXIS) if divisible else PartitionSpec())

    return jax.tree.map(place, tree)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a whole copy of `tree` on every device of the mesh."""
    return jax.tree.map(lambda leaf: put(mesh, leaf, PartitionSpec()), tree)


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
