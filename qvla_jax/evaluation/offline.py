"""Offline action error: chunks of a quantized policy against full precision and against the expert.

Everything is in the normalized action space of the policy; names say so. Sums are in float64.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from qvla_jax import sharding
from qvla_jax.array_typing import Float, NpArray
from qvla_jax.errors import InputError
from qvla_jax.families.layout import Layout
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress, track

if TYPE_CHECKING:
    from qvla_jax.inference.policy import Policy

_NO_FRAMES: Final = "there are no frames to evaluate on"
# The standard form of data sets has a gripper closed at 0 and open at 1.
_HALF_OPEN: Final = 0.5
_GRIPPER_LAST: Final[Mapping[int, float]] = {-1: _HALF_OPEN}


class _Policy(Protocol):
    """The part of `inference.Policy` that is used here."""

    @property
    def layout(self) -> Layout: ...

    def infer_normalized(self, batch: Mapping[str, Any]) -> Float[NpArray, "b h a"]: ...

    def normalize_standard(
        self, actions: Float[NpArray, "*b h a"], state: Float[NpArray, "*b p"] | None = None
    ) -> Float[NpArray, "*b h a"]: ...


class _Frames(Protocol):
    """The part of `data.calibration.CalibrationSet` that is used here."""

    @property
    def frames(self) -> int: ...

    def batches(self, size: int, /) -> Iterable[Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Chunks of one policy on a set of frames: the actions and entries that the robot executes.

    Attributes:
        chunks: `[N, s, e]`, normalized.
        expert: `[N, s, e]`, the demonstrator's actions from each frame on, normalized.
        grippers: which of these entries open and close grippers, and the value of a gripper that is
            half open.
    """

    chunks: Float[NpArray, "N s e"]
    expert: Float[NpArray, "N s e"]
    grippers: Mapping[int, float]

    @classmethod
    def of(
        cls,
        layout: Layout,
        chunks: Float[NpArray, "N h d"],
        expert: Float[NpArray, "N h d"],
        half_open: Float[NpArray, " d"],
    ) -> "Predictions":
        """From chunks and actions as a policy returns and normalizes them.

        Args:
            layout: of the policy.
            chunks: predictions.
            expert: the demonstrator's actions.
            half_open: a normalized action whose grippers are half open.

        Raises:
            InputError: a prediction is not finite.
        """
        entries = layout.action_entries
        grippers = {entries.index(entry): float(half_open[entry]) for entry in layout.grippers}
        return cls(layout.executed(_checked(chunks)), layout.executed(expert), grippers)

    def errors(self, reference: Float[NpArray, "N h a"]) -> "ActionErrors":
        """The chunks against other ones, such as the expert's; see `action_errors`."""
        return action_errors(self.chunks, reference, grippers=self.grippers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionErrors:
    """Errors of N chunks against a reference, all in the normalized action space.

    Attributes:
        action_sse_normalized: squared error summed over a chunk, averaged over frames: the unit of
            the sensitivities.
        action_mse_normalized: the same, per action entry.
        action_mse_median_normalized: median over frames of what `action_mse_normalized` averages. A
            few frames in which a policy is about to decide, such as when to close the gripper,
            hold much of the mean.
        action_l1_normalized: mean absolute error per action entry.
        mse_by_dimension: mean squared error of each action dimension, `[a]`.
        l1_by_dimension: mean absolute error of each action dimension, `[a]`.
        worst_by_dimension: largest absolute error of each action dimension, over all frames and
            steps, `[a]`.
        gripper_flips: gripper entries on the other side of half open than the reference's.
        gripper_flip_rate: the same, as a share of all gripper entries.
        frames: N.
    """

    action_sse_normalized: float
    action_mse_normalized: float
    action_mse_median_normalized: float
    action_l1_normalized: float
    mse_by_dimension: tuple[float, ...]
    l1_by_dimension: tuple[float, ...]
    worst_by_dimension: tuple[float, ...]
    gripper_flips: int
    gripper_flip_rate: float
    frames: int


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedFrames:
    """Frames as model inputs on the devices: decoded and prepared once for many policies.

    Attributes:
        inputs: batches of one size; the last one is padded.
        expert: `[N, h, d]`, the demonstrator's actions, normalized.
        half_open: a normalized action whose grippers are half open.
    """

    inputs: tuple[Any, ...]
    expert: Float[NpArray, "N h d"]
    half_open: Float[NpArray, " d"]

    @classmethod
    def of(cls, policy: "Policy", frames: _Frames, batch_size: int = 8) -> "PreparedFrames":
        """Prepares frames.

        Args:
            policy: what takes the same inputs as the policies that `predict` gets.
            frames: frames with the expert's actions.
            batch_size: frames for each call of a policy. Few of them stay in a CPU's cache.

        Raises:
            InputError: the frames carry no expert actions, or there are none.
        """
        mesh = sharding.data_mesh()
        size = -(-batch_size // mesh.size) * mesh.size
        inputs, expert, half_open = [], [], None
        for batch in frames.batches(size):
            expert.append(_expert(policy, batch))
            half_open = _half_open(policy, batch)
            padded, _ = sharding.pad_batch(policy.prepare(batch), size)
            inputs.append(sharding.shard_batch(mesh, padded))
        if half_open is None:
            raise InputError(_NO_FRAMES)
        return cls(tuple(inputs), np.concatenate(expert), half_open)

    def predict(self, policy: "Policy") -> Predictions:
        """Runs a policy on every frame.

        Raises:
            InputError: a prediction is not finite.
        """
        chunks = np.concatenate(policy.run_all(self.inputs))[: len(self.expert)]
        return Predictions.of(policy.layout, chunks, self.expert, self.half_open)


def action_errors(
    candidate: Float[NpArray, "N h a"],
    reference: Float[NpArray, "N h a"],
    *,
    grippers: Mapping[int, float] = _GRIPPER_LAST,
) -> ActionErrors:
    """Compares chunks with reference chunks.

    Args:
        candidate: normalized chunks.
        reference: chunks of the same shape: those of full precision, or the expert's.
        grippers: as `Predictions.grippers`.

    Raises:
        InputError: the shapes differ, there are no frames, or a value is not finite.
    """
    _check(candidate, reference)
    error = candidate.astype(np.float64) - reference.astype(np.float64)
    square, absolute = np.square(error), np.abs(error)
    flips = gripper_flips(candidate, reference, grippers)
    commands = error.shape[0] * error.shape[1] * len(grippers)
    return ActionErrors(
        action_sse_normalized=float(square.sum(axis=(1, 2)).mean()),
        action_mse_normalized=float(square.mean()),
        action_mse_median_normalized=float(np.median(square.mean(axis=(1, 2)))),
        action_l1_normalized=float(absolute.mean()),
        mse_by_dimension=tuple(square.mean(axis=(0, 1)).tolist()),
        l1_by_dimension=tuple(absolute.mean(axis=(0, 1)).tolist()),
        worst_by_dimension=tuple(absolute.max(axis=(0, 1)).tolist()),
        gripper_flips=flips,
        gripper_flip_rate=flips / commands if commands else 0.0,
        frames=error.shape[0],
    )


@in_32_bits
def evaluate(
    policy: _Policy,
    frames: _Frames,
    *,
    reference: "_Policy | Predictions",
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> ActionErrors:
    """How far a policy's actions are from another's on the same frames.

    >>> import qvla_jax
    >>> from qvla_jax.inference.quantize import quantize_uniform
    >>> full = qvla_jax.random_policy("tiny-test")
    >>> four = quantize_uniform(full, 4)
    >>> heldout = qvla_jax.calibration_set("bundled", frames=2, split="heldout")
    >>> errors = qvla_jax.evaluate(four, heldout, reference=full)
    >>> errors.frames, errors.action_mse_normalized > 0
    (2, True)

    Args:
        policy: the policy, such as a quantized one.
        frames: frames that it was not calibrated on.
        reference: the full-precision policy, or its `predict(...)`, to reuse it in many
            comparisons.
        batch_size: frames for each call of a policy.
        progress: called after each batch.

    Raises:
        InputError: the frames carry no expert actions, or a prediction is not finite.
    """
    if not isinstance(reference, Predictions):
        reference = predict(reference, frames, batch_size=batch_size, progress=progress)
    candidate = predict(policy, frames, batch_size=batch_size, progress=progress)
    return candidate.errors(reference.chunks)


def gripper_flips(
    candidate: Float[NpArray, "N h a"],
    reference: Float[NpArray, "N h a"],
    grippers: Mapping[int, float] = _GRIPPER_LAST,
) -> int:
    """Counts gripper commands on the other side of half open; arguments as of `action_errors`."""
    half = np.array(list(grippers.values()))
    ours, theirs = (chunks[..., list(grippers)] for chunks in (candidate, reference))
    return int(np.sum((ours > half) != (theirs > half)))


def predict(
    policy: _Policy,
    frames: _Frames,
    *,
    batch_size: int = 32,
    stage: str = "evaluate",
    progress: Progress = no_progress,
) -> Predictions:
    """Runs a policy on every frame.

    Args:
        policy: the policy.
        frames: frames with the expert's actions, such as a `CalibrationSet`.
        batch_size: frames per call of the policy.
        stage: name of the progress bar.
        progress: called after each batch.

    Raises:
        InputError: the frames carry no expert actions, or a prediction is not finite.
    """
    chunks, expert, half_open = [], [], None
    total = -(-frames.frames // batch_size)
    for batch in track(frames.batches(batch_size), total, stage, progress):
        expert.append(_expert(policy, batch))
        half_open = _half_open(policy, batch)
        chunks.append(np.asarray(policy.infer_normalized(batch)))
    if half_open is None:
        raise InputError(_NO_FRAMES)
    joined = np.concatenate(chunks), np.concatenate(expert)
    return Predictions.of(policy.layout, *joined, half_open)


def _expert(policy: _Policy, batch: Mapping[str, Any]) -> Float[NpArray, "b h a"]:
    if "actions" not in batch:
        raise InputError(
            f"frames for evaluation need the expert's 'actions'; got {', '.join(sorted(batch))}"
        )
    return policy.normalize_standard(np.asarray(batch["actions"]), batch.get("state"))


def _half_open(policy: _Policy, batch: Mapping[str, Any]) -> Float[NpArray, " d"]:
    """A normalized action whose grippers are half open; the other entries mean nothing."""
    action = np.full_like(np.asarray(batch["actions"])[:1, :1], _HALF_OPEN)
    state = batch["state"][:1] if "state" in batch else None
    return policy.normalize_standard(action, state)[0, 0]


def _checked(chunks: Float[NpArray, "b h a"]) -> Float[NpArray, "b h a"]:
    if not np.isfinite(chunks).all():
        raise InputError("the policy predicts actions that are not finite: check its weights")
    return chunks


def _check(candidate: np.ndarray, reference: np.ndarray) -> None:
    if candidate.shape != reference.shape or candidate.ndim != 3 or not candidate.size:
        raise InputError(
            "chunks to compare must both be [N, h, a] with N >= 1; "
            f"got {list(candidate.shape)} and {list(reference.shape)}"
        )
    for name, chunks in (("candidate", candidate), ("reference", reference)):
        if not np.isfinite(chunks).all():
            raise InputError(f"the {name} chunks have entries that are not finite")
