"""Calibration frames as equal batches on the device mesh."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qvla_jax import sharding
from qvla_jax.array_typing import Array, Int
from qvla_jax.errors import InputError
from qvla_jax.families.layout import Layout


class Calibration(Protocol):
    """What the methods need from a calibration set; `data.calibration.CalibrationSet` is one."""

    @property
    def frames(self) -> int:
        """Frames in the set."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Identifies the set; `sha256` is its hash."""
        ...

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """Observation batches; the last one may be smaller."""
        ...


class ModelPolicy(Protocol):
    """What the methods need from a policy; `inference.Policy` is one."""

    @property
    def model(self) -> Any:
        """The network, an NNX module from model inputs to normalized action chunks [b, h, a]."""
        ...

    @property
    def layout(self) -> Layout:
        """Names of the network's modules, and numbers of a call."""
        ...

    def prepare(self, batch: Mapping[str, Any]) -> Any:
        """Model inputs; arrays share their first axis, the batch."""
        ...

    def complete(self, inputs: Any) -> Any:
        """The same inputs, completed by what the model would have to decode first."""
        ...


@dataclasses.dataclass(frozen=True)
class FirstFrames:
    """The first frames of a calibration set, which come in random order."""

    whole: Calibration
    frames: int

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest of the whole set, and the number of frames used."""
        return {**self.whole.manifest, "first_frames": self.frames}

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """Batches of `size` frames; the last one may be smaller."""
        whole, part = divmod(self.frames, size)
        for number, batch in enumerate(
            itertools.islice(self.whole.batches(size), whole + (part > 0))
        ):
            keep = size if number < whole else part
            yield {key: value[:keep] for key, value in batch.items()}


@dataclasses.dataclass(frozen=True)
class FrameBatch:
    """One batch, padded to the common size by repeating its last frame.

    Every batch has the same shapes, so that a step is compiled once.
    """

    # Model inputs on the mesh, [b, ...] split over the devices.
    inputs: Any
    # Number of each frame in the calibration set, on the mesh; a frame's probes depend only on it.
    frames: Int[Array, " b"]
    # Number of real frames.
    count: int


def batch_size(frames: int, wanted: int, mesh: Mesh) -> int:
    """Frames of one batch on all devices, `wanted` on each (but no more than there are).

    A device's share does not depend on the number of devices, so every frame is computed by the
    same program on every mesh.
    """
    return max(min(wanted, frames), 1) * mesh.shape[sharding.DATA_AXIS]


def frame_batches(
    policy: ModelPolicy, calibration: Calibration, size: int, mesh: Mesh
) -> Iterator[FrameBatch]:
    """Batches of `size` frames on the mesh.

    Raises:
        InputError: the calibration set is empty.
    """
    start = 0
    for batch in calibration.batches(size):
        inputs = jax.tree.map(np.asarray, policy.prepare(batch))
        count = len(jax.tree.leaves(inputs)[0])
        numbers = np.arange(start, start + count, dtype=np.int32)
        padded, _ = sharding.pad_batch((inputs, numbers), size)
        placed: Any = sharding.shard_batch(mesh, padded)
        inputs = policy.complete(placed[0])
        yield FrameBatch(inputs=inputs, frames=placed[1], count=count)
        start += count
    if start == 0:
        raise InputError("the calibration set holds no frames")
