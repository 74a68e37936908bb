"""`Sweep`: what every sweep over channels works with."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qvla_jax import sharding
from qvla_jax.array_typing import Float
from qvla_jax.models.surgery import get_module
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.quantizer import NEAREST_UNCORRECTED, Quantizer
from qvla_jax.sensitivity.batches import (
    Calibration,
    FrameBatch,
    ModelPolicy,
    batch_size,
    frame_batches,
)
from qvla_jax.sensitivity.store import NOTHING_KEPT, Items, SweepStore

DEFAULT_MEMORY = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """A policy, frames and a quantizer, and how to go through them."""

    # In full precision, or where derivatives are taken.
    policy: ModelPolicy
    # The frames x that are averaged over.
    calibration: Calibration
    # The channels.
    index: ChannelIndex
    # The quantizer that is costed, and its options without 16 bits.
    quantizer: Quantizer = dataclasses.field(default_factory=lambda: Quantizer(NEAREST_UNCORRECTED))
    bits: tuple[int, ...] = ()
    # Of everything random: probes, and what is probed first.
    seed: int = 0
    # Frames at a time on each device; memory grows with it.
    batch: int = 4
    # Bytes that the activations of simultaneous perturbations may take on each device.
    memory: int = DEFAULT_MEMORY
    # Weight of each action dimension; None weighs all equally.
    weights: Float[np.ndarray, " a"] | None = None
    # Actions of a chunk that count, from the first; None: all.
    steps: int | None = None
    # From `sharding.sweep_mesh`.
    mesh: Mesh = dataclasses.field(default_factory=sharding.sweep_mesh)
    # Split the policy's weights over the mesh's `channel` axis, if they do not fit on one device.
    split_weights: bool = False
    # Keeps finished items.
    store: SweepStore | None = None
    progress: Progress = no_progress

    @functools.cached_property
    def layers(self) -> dict[str, nnx.Linear]:
        """The policy's layers in the order of the index."""
        found: dict[str, Any] = {p: get_module(self.policy.model, p) for p in self.index.paths}
        return found

    @property
    def batch_size(self) -> int:
        """Frames of one batch on all devices."""
        return batch_size(self.calibration.frames, self.batch, self.mesh)

    def batches(self) -> Iterator[FrameBatch]:
        """Batches of frames on the mesh.

        Raises:
            InputError: the calibration set is empty.
        """
        return frame_batches(self.policy, self.calibration, self.batch_size, self.mesh)

    def items(self, **made_with: Any) -> Items:
        """The store's finished items of a sweep with these settings (JSON values)."""
        if self.store is None:
            return NOTHING_KEPT
        settings: Mapping[str, Any] = {
            "calibration": self.calibration.manifest["sha256"],
            "frames": self.calibration.frames,
            "batch": self.batch_size,
            "weights": None if self.weights is None else self.weights.tolist(),
            "steps": self.steps,
        }
        return self.store.sweep(**settings, **made_with)
