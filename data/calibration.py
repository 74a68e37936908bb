"""Calibration sets: observations drawn by a seed, named by a manifest, rebuilt from it exactly."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from qvla_jax.array_typing import Float32, NpArray
from qvla_jax.atomic import write_json
from qvla_jax.data import standardize
from qvla_jax.data.episode import EncodedEpisode, decode_images, next_steps
from qvla_jax.data.rlds import RldsDataset
from qvla_jax.data.samples import bundled_path
from qvla_jax.data.sampling import interleave, spread, stratified
from qvla_jax.errors import DatasetError, InputError

DEFAULT_FRAMES: Final = 128
BUNDLED: Final = "bundled"
_FORMAT: Final = 1
# What the manifest's hash covers: everything that decides what the set holds, not where it lies.
_HASHED: Final = (
    "format",
    "dataset",
    "version",
    "split",
    "standardization",
    "horizon",
    "episodes",
    "steps",
    "files",
)

Batch = dict[str, Any]


@dataclass(frozen=True)
class CalibrationSet:
    """Observations with the expert's next actions, in a fixed order.

    Frames come in random order, so that the first few are already spread over tasks. Images stay
    encoded until a batch is asked for: 512 whole trajectories fit into memory.

    Attributes:
      manifest: What the set holds, ready for JSON; ``manifest["sha256"]`` names it.
    """

    manifest: Mapping[str, Any]
    _episodes: Mapping[int, EncodedEpisode]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.manifest["steps"])

    def __len__(self) -> int:
        return self.frames

    @property
    def hash(self) -> str:
        """The sha256 that names the set."""
        return self.manifest["sha256"]

    def batches(self, size: int) -> Iterator[Batch]:
        """Yields batches of ``size`` frames; the last one may be smaller.

        A batch is what `Policy.infer_normalized` takes: image and wrist_image u8[b, H, W, 3], state
        f32[b, p], instruction (list of str); and also actions f32[b, h, a] (standardized, not
        normalized), episode i64[b], step i64[b].
        """
        if size < 1:
            raise InputError(f"batch size must be at least 1, got {size}")
        for start in range(0, self.frames, size):
            yield self._batch(slice(start, start + size))

    def save(self, path: str | Path) -> None:
        """Writes the manifest; `from_manifest` reads it."""
        write_json(path, dict(self.manifest))

    @classmethod
    def from_manifest(
        cls, manifest: str | Path | Mapping[str, Any], *, source: str | Path | None = None
    ) -> Self:
        """Rebuilds exactly the set that a manifest names.

        Args:
          manifest: A manifest or the path of one.
          source: Where the data lie, if no longer where the manifest says.

        Raises:
          DatasetError: The manifest was altered, or the data are not those it was drawn from.
        """
        if isinstance(manifest, str | Path):
            where = str(manifest)
            try:
                tree: Mapping[str, Any] = json.loads(Path(manifest).read_text())
            except (OSError, ValueError) as error:
                raise DatasetError(f"{where}: cannot be read as JSON ({error})") from error
        else:
            where, tree = "manifest", manifest
        _check_manifest(tree, where)
        dataset = RldsDataset(_resolve(source or tree["source"]), tree["split"])
        found, expected = dataset.file_hashes(), tree["files"]
        if found != expected:
            changed = sorted(
                name for name in {*found, *expected} if found.get(name) != expected.get(name)
            )
            raise DatasetError(
                f"{where}: the data at {dataset.path} are not those it was drawn from (differing: "
                f"{', '.join(changed)}); restore them or draw a new calibration set"
            )
        return cls(tree, _load(dataset, tree["episodes"]))

    def _batch(self, rows: slice) -> Batch:
        ids, steps = self.manifest["episodes"][rows], self.manifest["steps"][rows]
        pairs = [(self._episodes[i], t) for i, t in zip(ids, steps, strict=True)]
        batch: Batch = {"image": decode_images(e.image[t] for e, t in pairs)}
        # A data set has these for all its episodes or for none.
        if wrist := [e.wrist_image[t] for e, t in pairs if e.wrist_image is not None]:
            batch["wrist_image"] = decode_images(wrist)
        if state := [e.episode.state[t] for e, t in pairs if e.episode.state is not None]:
            batch["state"] = np.stack(state)
        batch["instruction"] = [e.episode.instruction for e, _ in pairs]
        batch["actions"] = np.stack([self._actions(e, t) for e, t in pairs])
        batch["episode"] = np.asarray(ids, np.int64)
        batch["step"] = np.asarray(steps, np.int64)
        return batch

    def _actions(self, encoded: EncodedEpisode, step: int) -> Float32[NpArray, "h a"]:
        transform = standardize.get(self.manifest["standardization"])
        actions = transform(encoded.episode).action
        return actions[next_steps(np.asarray([step]), len(actions), self.manifest["horizon"])[0]]


def calibration_set(
    source: str | Path = BUNDLED,
    *,
    frames: int | None = None,
    trajectories: int | None = None,
    stride: int = 1,
    seed: int = 0,
    split: str = "calibration",
    horizon: int = 8,
    standardization: str = "libero",
) -> CalibrationSet:
    """Draws a calibration set.

    Frames are spread evenly over tasks, within a task over its episodes, and within an episode over
    its length. The draw depends on the data, the seed and the arguments alone.

    Args:
      source: "bundled", or an RLDS directory.
      frames: Number of frames. Without it, every frame of the trajectories drawn; without either,
        128 frames.
      trajectories: Draw from this many episodes only; by default from all.
      stride: Without `frames`, take every `stride`-th step of each trajectory, from the first on:
        where a policy that executes chunks of that length would look.
      seed: Seed of the draw.
      split: Split to draw from.
      horizon: Number of actions of the expert with each frame.
      standardization: Name in `standardize.STANDARDIZATIONS`, for those actions.

    Raises:
      DatasetError: The data cannot be read, or hold fewer frames or trajectories than asked for.
    """
    for name, value in (
        ("frames", frames),
        ("trajectories", trajectories),
        ("horizon", horizon),
        ("stride", stride),
    ):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if stride > 1 and frames is not None:
        raise InputError("a stride goes with whole trajectories: give `trajectories`, not `frames`")
    standardize.get(standardization)
    if frames is None and trajectories is None and stride == 1:
        frames = DEFAULT_FRAMES
    dataset = RldsDataset(_resolve(source), split)
    tasks: dict[str, list[int]] = {}
    lengths: dict[int, int] = {}
    for encoded in dataset.encoded_episodes():
        episode = encoded.episode
        tasks.setdefault(episode.instruction, []).append(episode.id)
        lengths[episode.id] = len(episode)
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(ids) for _, ids in sorted(tasks.items())]
    chosen = interleave([groups[i] for i in rng.permutation(len(groups))])
    if trajectories is not None:
        if trajectories > len(chosen):
            raise DatasetError(
                f"{dataset.path}: {trajectories} trajectories asked for, split {split!r} has "
                f"{len(chosen)}"
            )
        chosen = chosen[:trajectories]
    steps = {i: range(0, lengths[i], stride) for i in chosen}
    available = sum(map(len, steps.values()))
    if frames is None:
        frames = available
    if frames > available:
        raise DatasetError(
            f"{dataset.path}: {frames} frames asked for, {len(chosen)} episodes of split {split!r} "
            f"have {available}"
        )
    counts = spread(frames, np.asarray([len(steps[i]) for i in chosen]))
    pairs = [
        (i, steps[i][place])
        for i, count in zip(chosen, counts.tolist(), strict=True)
        for place in stratified(len(steps[i]), count, rng)
    ]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    manifest = {
        "format": _FORMAT,
        "dataset": dataset.name,
        "version": dataset.version,
        "source": source if source == BUNDLED else str(dataset.path.resolve()),
        "split": split,
        "seed": seed,
        "standardization": standardization,
        "horizon": horizon,
        "frames": frames,
        "trajectories": len({i for i, _ in pairs}),
        "episodes": [i for i, _ in pairs],
        "steps": [step for _, step in pairs],
        "files": dataset.file_hashes(),
    }
    manifest["sha256"] = _hash(manifest)
    return CalibrationSet(manifest, _load(dataset, manifest["episodes"]))


def _resolve(source: str | Path) -> Path:
    return bundled_path() if source == BUNDLED else Path(source)


def _load(dataset: RldsDataset, ids: Sequence[int]) -> dict[int, EncodedEpisode]:
    return {e.episode.id: e for e in dataset.encoded_episodes(sorted(set(ids)))}


def _hash(manifest: Mapping[str, Any]) -> str:
    content = {key: manifest[key] for key in _HASHED}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_manifest(manifest: Any, where: str) -> None:
    needed = (*_HASHED, "source", "sha256")
    if not isinstance(manifest, Mapping) or any(key not in manifest for key in needed):
        raise DatasetError(f"{where}: not a calibration manifest; expected {', '.join(needed)}")
    if manifest["format"] != _FORMAT:
        raise DatasetError(f"{where}: format {manifest['format']}, this version reads {_FORMAT}")
    if manifest["sha256"] != _hash(manifest):
        raise DatasetError(f"{where}: its content does not fit its sha256; it was altered")
