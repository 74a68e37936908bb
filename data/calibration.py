"""Calibration sets: observations drawn by a seed, named by a manifest, rebuilt from it exactly."""

import itertools
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias

import numpy as np

from qvla_jax.array_typing import Float32, Int64, NpArray
from qvla_jax.atomic import write_json
from qvla_jax.data.drawing import Pool, draw, look
from qvla_jax.data.episode import CAMERAS, EncodedEpisode, next_steps
from qvla_jax.data.manifest import (
    FORMAT,
    check_manifest,
    manifest_hash,
    noise,
    noise_seeds,
    steps_by_source,
)
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.data.opening import open_source
from qvla_jax.data.pictures import Pictures, check_each, decode_each
from qvla_jax.data.places import dataset_folder
from qvla_jax.data.samples import bundled_path
from qvla_jax.data.sampling import apportion
from qvla_jax.data.source import EpisodeSource
from qvla_jax.errors import DatasetError, InputError
from qvla_jax.progress import Progress, no_progress
from qvla_jax.remote.folder import remote_name

DEFAULT_FRAMES: Final = 128
# Maximum number of episodes to read from each data set.
DEFAULT_EPISODES: Final = 512
BUNDLED: Final = "bundled"

Source: TypeAlias = str | PathLike[str]
Batch = dict[str, Any]


@dataclass(frozen=True)
class CalibrationSet:
    """Observations with the expert's next actions, in a fixed order.

    Frames come in random order, so that the first few are already spread over tasks. Images of
    other steps are not kept, and stay encoded until a batch is asked for: 512 whole trajectories
    fit into memory.

    Attributes:
        manifest: what the set holds, ready for JSON; `manifest["sha256"]` names it.
    """

    manifest: Mapping[str, Any]
    # By the index of their data set among the sources, and their id.
    _episodes: Mapping[tuple[int, int], EncodedEpisode]

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

    @property
    def episode_keys(self) -> list[tuple[int, int]]:
        """For each frame, the index of its data set among the sources and its episode's id."""
        return list(zip(self.manifest["datasets"], self.manifest["episodes"], strict=True))

    def batches(self, size: int) -> Iterator[Batch]:
        """Yields batches of `size` frames; the last one may be smaller.

        A batch is what `Policy.infer_normalized` takes: image and those of the other cameras,
        u8[b, H, W, 3] (a list of u8[H, W, 3] where data sets differ in size), state f32[b, p],
        instruction (list of str), seed i64[b], which policies that sample draw each frame's noise
        from; and also actions f32[b, h, a] (standardized, not normalized), episode i64[b], step
        i64[b]. A mixture has a camera and state only if all its data sets have them, and state only
        if all have the same length.
        """
        if size < 1:
            raise InputError(f"batch size must be at least 1, got {size}")
        for start in range(0, self.frames, size):
            yield self._batch(slice(start, start + size))

    def describe(self) -> dict[str, Any]:
        """Describes the set for reports, without the location of the data."""
        sources, manifest = self.manifest["sources"], self.manifest

        def joined(key: str) -> str:
            return ", ".join(dict.fromkeys(source[key] for source in sources))

        return {
            **{key: joined(key) for key in ("dataset", "version", "split")},
            **{key: manifest[key] for key in ("frames", "seed")},
            "episodes": manifest["trajectories"],
            "hash": self.hash,
        }

    def shares_data_with(self, other: "CalibrationSet") -> bool:
        """Whether both sets draw from the same split of a data set and share at least one file."""

        def files(drawn: CalibrationSet) -> set[tuple[str, ...]]:
            return {
                (source["dataset"], source["version"], source["split"], *file)
                for source in drawn.manifest["sources"]
                for file in source["files"].items()
            }

        return not files(self).isdisjoint(files(other))

    def redraw(
        self,
        *,
        frames: int | None = None,
        trajectories: int | None = None,
        stride: int = 1,
        seed: int = 0,
        horizon: int | None = None,
    ) -> "CalibrationSet":
        """Draws another set from the same data; arguments are those of `calibration_set`."""
        sources = self.manifest["sources"]
        return _drawn(
            [(_open(source), source["source"], source["weight"]) for source in sources],
            frames=frames,
            trajectories=trajectories,
            stride=stride,
            seed=seed,
            horizon=self.manifest["horizon"] if horizon is None else horizon,
            max_episodes=self.manifest["max_episodes"],
            balance=False,
            gripper_share=None,
            progress=no_progress,
        )

    def with_noise(self, draw: int) -> "CalibrationSet":
        """The same frames with other noise, for policies that sample their actions.

        Args:
            draw: number of the draw; sets are drawn with 0.
        """
        manifest = {**self.manifest, "noise": noise(draw)}
        return replace(self, manifest={**manifest, "sha256": manifest_hash(manifest)})

    def save(self, path: str | Path) -> None:
        """Writes the manifest; `from_manifest` reads it."""
        write_json(path, dict(self.manifest))

    @classmethod
    def from_manifest(
        cls, manifest: str | Path | Mapping[str, Any], *, source: Source | None = None
    ) -> Self:
        """Rebuilds exactly the set that a manifest names.

        Args:
            manifest: a manifest or the path of one.
            source: location of the data, if it is no longer that of the manifest; for one data set.

        Raises:
            DatasetError: the manifest was altered, or the data are not those it was drawn from.
        """
        if isinstance(manifest, str | Path):
            where = str(manifest)
            try:
                tree: Mapping[str, Any] = json.loads(Path(manifest).read_text())
            except (OSError, ValueError) as error:
                raise DatasetError(f"{where}: cannot be read as JSON ({error})") from error
        else:
            where, tree = "manifest", manifest
        check_manifest(tree, where)
        if source is not None and len(tree["sources"]) > 1:
            raise InputError(f"{where}: a mixture; its data sets cannot all lie at {source}")
        datasets = [_open(entry, source) for entry in tree["sources"]]
        drawn = steps_by_source(tree)
        for place, (entry, dataset) in enumerate(zip(tree["sources"], datasets, strict=True)):
            found, expected = dataset.file_hashes(list(drawn[place])), entry["files"]
            if found != expected:
                changed = sorted(
                    name for name in {*found, *expected} if found.get(name) != expected.get(name)
                )
                raise DatasetError(
                    f"{where}: the data at {dataset.path} are not those it was drawn from "
                    f"(differing: {', '.join(changed)}); restore them or draw a new calibration set"
                )
        return cls(tree, _load(datasets, drawn))

    def _batch(self, rows: slice) -> Batch:
        pairs = list(zip(self.episode_keys[rows], self.manifest["steps"][rows], strict=True))
        found = [(self._episodes[key], step) for key, step in pairs]
        batch: Batch = {
            camera: decode_each(self._pictures(camera, rows)) for camera in self._cameras
        }
        if self._has_states:
            states = [(e.episode.state, t) for e, t in found]
            batch["state"] = np.stack([state[t] for state, t in states if state is not None])
        batch["instruction"] = [e.episode.instructions[t] for e, t in found]
        batch["seed"] = self._noise_seeds[rows]
        batch["actions"] = np.stack([self._actions(e.episode.action, t) for e, t in found])
        batch["episode"] = np.asarray([episode for (_, episode), _ in pairs], np.int64)
        batch["step"] = np.asarray([step for _, step in pairs], np.int64)
        return batch

    @cached_property
    def _noise_seeds(self) -> Int64[NpArray, " frames"]:
        return noise_seeds(self.manifest)

    @cached_property
    def _cameras(self) -> list[str]:
        return [
            name for name in CAMERAS if all(name in e.pictures for e in self._episodes.values())
        ]

    def _pictures(self, camera: str, rows: slice) -> list[tuple[Pictures, int]]:
        """The pictures of some frames, each as its episode's pictures and its step."""
        pairs = zip(self.episode_keys[rows], self.manifest["steps"][rows], strict=True)
        return [(self._episodes[key].pictures[camera], step) for key, step in pairs]

    def check_pictures(self) -> None:
        """Decodes every picture once, so that none fails in the middle of a later stage.

        Raises:
            DatasetError: one does not decode, or pictures of one episode differ in size.
        """
        for camera in self._cameras:
            check_each(self._pictures(camera, slice(None)))

    def check_actions(self) -> None:
        """Checks that all actions have the same length.

        Raises:
            DatasetError: those of two data sets differ.
        """
        lengths = {place: e.episode.action.shape[1] for (place, _), e in self._episodes.items()}
        if len(set(lengths.values())) > 1:
            names = [source["dataset"] for source in self.manifest["sources"]]
            told = ", ".join(f"{names[place]} {lengths[place]}" for place in sorted(lengths))
            raise DatasetError(
                f"actions of a mixture differ in length ({told}); choose sets of one robot"
            )

    @cached_property
    def _has_states(self) -> bool:
        """Whether all data sets have states, of one length, so that every batch has them."""
        states = (e.episode.state for e in self._episodes.values())
        lengths = {None if state is None else state.shape[1] for state in states}
        return len(lengths) == 1 and None not in lengths

    def _actions(self, actions: Float32[NpArray, "t a"], step: int) -> Float32[NpArray, "h a"]:
        return actions[next_steps(np.asarray([step]), len(actions), self.manifest["horizon"])[0]]


def calibration_set(
    source: Source | Mapping[str, float] = BUNDLED,
    *,
    frames: int | None = None,
    trajectories: int | Literal["all"] | None = None,
    stride: int = 1,
    seed: int = 0,
    split: str | None = None,
    horizon: int = 8,
    spec: DatasetSpec | str | None = None,
    max_episodes: int = DEFAULT_EPISODES,
    balance: bool = False,
    gripper_share: float | None = None,
    progress: Progress = no_progress,
) -> CalibrationSet:
    """Draws a calibration set.

    Frames are spread evenly over tasks, within a task over its episodes, and within an episode over
    its length. The draw depends only on the data, the seed and the arguments.

    >>> import qvla_jax
    >>> frames = qvla_jax.calibration_set("bundled", frames=3, seed=0)
    >>> batch = next(frames.batches(2))
    >>> batch["image"].shape, batch["actions"].shape
    ((2, 128, 128, 3), (2, 8, 7))
    >>> batch["instruction"][0].partition(" in ")[0]
    'pick up the black bowl'
    >>> again = qvla_jax.calibration_set("bundled", frames=3, seed=0)
    >>> frames.hash == again.hash  # which results name their frames by
    True

    Args:
        source: "bundled", an RLDS or LeRobot directory, the address of one (gs://...), or several
            of these with their weights: each gets a proportional share of the frames.
        frames: number of frames. Without it, every frame of the trajectories drawn; without either,
            128 frames.
        trajectories: draw from this many episodes only; by default from all, "all" also takes all
            their frames.
        stride: without `frames`, take every `stride`-th step of each trajectory, from the first on:
            where a policy that executes chunks of that length would look.
        seed: seed of the draw.
        split: split to draw from; by default "calibration" if there is one, else "train".
        horizon: number of actions of the expert with each frame.
        spec: how a data set is read, if not as its name says; see `open_source`.
        max_episodes: maximum number of episodes to read from each data set (see `drawing.look`),
            unless all are requested.
        balance: multiply weights by the number of frames of each data set, as the public training
            code does; see `open_x.mixture_below`.
        gripper_share: share of the frames that are drawn where the expert opens or closes the
            gripper within the horizon, which decides success; None draws from all steps equally.
        progress: called with the episodes read.

    Raises:
        DatasetError: the data cannot be read, hold fewer frames or trajectories than requested, or
            hold an invalid number or instruction in an episode that is read, or an invalid picture
            in a drawn frame. docs/data.md lists what is checked.
    """
    for name, value in (
        ("frames", frames),
        ("trajectories", None if trajectories == "all" else trajectories),
        ("horizon", horizon),
        ("stride", stride),
        ("max_episodes", max_episodes),
    ):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if stride > 1 and frames is not None:
        raise InputError("a stride goes with whole trajectories: give `trajectories`, not `frames`")
    if frames is None and trajectories is None and stride == 1:
        frames = DEFAULT_FRAMES
    if gripper_share is not None:
        if not 0 <= gripper_share <= 1:
            raise InputError(f"gripper_share must lie between 0 and 1, got {gripper_share}")
        if frames is None:
            raise InputError("gripper_share is a share of frames: give `frames`")
    if trajectories == "all":
        trajectories, max_episodes = None, sys.maxsize
    weights = source if isinstance(source, Mapping) else {str(source): 1.0}
    if not weights or any(not 0 < weight < np.inf for weight in weights.values()):
        raise InputError(f"weights of data sets must be positive, got {dict(weights)}")
    opened = []
    for place, weight in weights.items():
        path = _resolve(place, None if progress is no_progress else progress)
        dataset = open_source(path, split, spec=spec)
        name = place if place == BUNDLED else _absolute(dataset)
        opened.append((dataset, name, weight))
    return _drawn(
        opened,
        frames=frames,
        trajectories=trajectories,
        stride=stride,
        seed=seed,
        horizon=horizon,
        max_episodes=max_episodes,
        balance=balance,
        gripper_share=gripper_share,
        progress=progress,
    )


def _drawn(
    opened: Sequence[tuple[EpisodeSource, str, float]],
    *,
    frames: int | None,
    trajectories: int | None,
    stride: int,
    seed: int,
    horizon: int,
    max_episodes: int,
    balance: bool,
    gripper_share: float | None,
    progress: Progress,
) -> CalibrationSet:
    total = sum(min(len(dataset), max_episodes) for dataset, _, _ in opened)
    done = itertools.count(1)
    progress("calibrate", 0, total)
    pools = [
        look(
            dataset,
            max_episodes=max_episodes,
            stride=stride,
            horizon=None if gripper_share is None else horizon,
            seed=seed,
            seen=lambda: progress("calibrate", next(done), total),
        )
        for dataset, _, _ in opened
    ]
    progress("calibrate", total, total)
    weights = [
        weight * (pool.split_frames if balance else 1.0)
        for pool, (_, _, weight) in zip(pools, opened, strict=True)
    ]
    frame_shares = _shares(frames, weights, pools, [pool.frames for pool in pools], "frames")
    trajectory_shares = _shares(
        trajectories, weights, pools, [pool.episodes for pool in pools], "trajectories"
    )
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int]] = []
    sources: list[dict[str, Any]] = []
    left_out: list[str] = []
    kept: list[EpisodeSource] = []
    for pool, (dataset, name, _), weight, some, few in zip(
        pools, opened, weights, frame_shares, trajectory_shares, strict=True
    ):
        if some == 0 or few == 0:
            left_out.append(dataset.name)
            continue
        pairs = draw(
            pool, frames=some, trajectories=few, rng=rng, gripper_share=gripper_share
        )  # fmt: skip
        kept.append(dataset)
        rows += [(len(sources), episode, step) for episode, step in pairs]
        sources.append(
            {
                "dataset": dataset.name,
                "version": dataset.version,
                "source": name,
                "split": dataset.split,
                "weight": weight,
                "unlabeled": pool.unlabeled,
                "spec": dataset.spec.to_json(),
                "files": dataset.file_hashes([episode for episode, _ in pairs]),
            }
        )
    rows = [rows[i] for i in rng.permutation(len(rows))]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "sources": sources,
        "left_out": left_out,
        "seed": seed,
        "horizon": horizon,
        "max_episodes": max_episodes,
        "frames": len(rows),
        "trajectories": len({row[:2] for row in rows}),
        "datasets": [row[0] for row in rows],
        "episodes": [row[1] for row in rows],
        "steps": [row[2] for row in rows],
        "noise": noise(0),
    }
    manifest["sha256"] = manifest_hash(manifest)
    drawn = CalibrationSet(manifest, _load(kept, steps_by_source(manifest)))
    drawn.check_actions()
    drawn.check_pictures()
    return drawn


def _shares(
    total: int | None,
    weights: Sequence[float],
    pools: Sequence[Pool],
    capacity: Sequence[int],
    what: str,
) -> Sequence[int | None]:
    """Each data set's part of `total`; a single set gives all (`draw` reports a shortage)."""
    if total is None or len(pools) == 1:
        return [total] * len(pools)
    if total > sum(capacity):
        raise DatasetError(f"{total} {what} asked for, the episodes looked at have {sum(capacity)}")
    return apportion(total, weights, capacity).tolist()


def _open(entry: Mapping[str, Any], source: Source | None = None) -> EpisodeSource:
    spec = DatasetSpec.from_json(entry["spec"], f"manifest: {entry['dataset']}")
    return open_source(_resolve(source or entry["source"]), entry["split"], spec=spec)


def _resolve(source: Source, progress: Progress | None = None) -> Source:
    return bundled_path() if source == BUNDLED else dataset_folder(source, progress=progress)


def _absolute(dataset: EpisodeSource) -> str:
    path = dataset.path
    if (name := remote_name(Path(path))) is not None:
        return name
    return str(path) if "://" in str(path) else str(path.resolve())


def _load(
    datasets: Sequence[EpisodeSource], drawn: Sequence[Mapping[int, Collection[int]]]
) -> dict[tuple[int, int], EncodedEpisode]:
    return {
        (place, encoded.episode.id): encoded.only(steps[encoded.episode.id])
        for place, (dataset, steps) in enumerate(zip(datasets, drawn, strict=True))
        for encoded in dataset.encoded_episodes(list(steps))
    }
