"""Reads LeRobot data sets: episodes and frames in standard form."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
from etils import epath

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.data import open_x
from qvla_jax.data.episode import EncodedEpisode
from qvla_jax.data.hashing import digest, sample
from qvla_jax.data.lerobot.episodes import Episodes, read_episodes, read_tasks, tasks_file
from qvla_jax.data.lerobot.info import TASK, read_info
from qvla_jax.data.lerobot.rows import RowFiles, StoredPictures, values
from qvla_jax.data.lerobot.videos import TOLERANCE, VideoFrames
from qvla_jax.data.location import DESCRIPTIONS, LEROBOT, locate
from qvla_jax.data.open_x.columns import Entries
from qvla_jax.data.open_x.features import check_features, has_all
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.data.open_x.standardize import OPTIONAL, kept_steps, standardize
from qvla_jax.data.pictures import LazyPictures
from qvla_jax.data.source import EpisodeSource, Outline
from qvla_jax.errors import DatasetError
from qvla_jax.remote.folder import ensure

_INDEX: Final = "episode_index"
_STEP: Final = "frame_index"
_TIME: Final = "timestamp"
_TASK_INDEX: Final = "task_index"


class LeRobotDataset(EpisodeSource):
    """One split of a LeRobot directory, or this process's share of it.

    Lengths and instructions come from its tables. Rows are read of the episodes that are asked for,
    pictures when they are decoded, and of videos the frames that are decoded. Such a set does not
    state its name: it has that of its specification, and its version is that of its format.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        split: str = "train",
        *,
        spec: DatasetSpec | str | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens a data set; reads only meta/info.json.

        Args:
            path: the directory with meta/info.json, or a parent with only one data set below it.
            split: a split's name; no slices.
            spec: how to read it: a specification, the name of one such as lerobot/libero, or the
                name of a JSON file with one. By default it is found by the names of the last two
                directories.
            process_index: the share to read: episodes `process_index`, `+ process_count`, ...
            process_count: number of shares.

        Raises:
            DatasetError: no data set there, no such split, no specification known, or the data set
                does not fit it.
        """
        self.path = locate(path, LEROBOT)
        self._info = read_info(self.path)
        if split not in self._info.splits:
            raise DatasetError(
                f"{self.path}: no split {split!r}; it has {', '.join(self._info.splits) or 'none'}"
                ", as `splits` in meta/info.json says"
            )
        self.split, self._of_split = split, self._info.splits[split]
        self.num_episodes = len(self._of_split)
        found = self._find_spec() if spec is None else open_x.load(spec)
        self.spec = found.for_features(self._info.features)
        self.name, self.version = self.spec.name, self._info.version
        cameras = self.spec.cameras().values()
        self._videos = [name for name in cameras if name in self._info.videos]
        self._check_spec()
        self._rows = RowFiles(self.path)
        self._share(process_index, process_count)

    def _find_spec(self) -> DatasetSpec:
        name = _public_name(self.path)
        spec = open_x.find(name)
        if spec is None:
            known = [name for name in sorted(open_x.NAMES) if "/" in name]
            message = open_x.not_found(name, known, like="lerobot/libero")
            raise DatasetError(f"{self.path}: {message}")
        return spec

    def _check_spec(self) -> None:
        needed = [_INDEX, _STEP, _TASK_INDEX, *([_TIME] if self._videos else [])]
        try:
            for name in (*self.spec.features(), *self._columns):
                if name in self._info.refused:
                    raise DatasetError(f"{name}: {self._info.refused[name]}")
            check_features(self.spec, self._info.features)
            if missing := [name for name in needed if name not in self._info.features]:
                raise DatasetError(f"steps lack {', '.join(missing)}, which every set has")
        except DatasetError as error:
            raise DatasetError(f"{self.path}: {error}") from error

    @cached_property
    def _episodes(self) -> Episodes:
        return read_episodes(self._info, self._videos)

    @cached_property
    def _tasks(self) -> Mapping[int, str]:
        return read_tasks(self._info)

    @cached_property
    def _columns(self) -> list[str]:
        """The columns of numbers and texts that an episode is made of."""
        info, spec = self._info, self.spec
        names = [_INDEX, _STEP, _TASK_INDEX, *([_TIME] if self._videos else []), spec.instruction]
        names += [Entries.parse(text).path for text in spec.columns()]
        if has_all(spec.joint_state, info.features):
            names += [Entries.parse(text).path for text in spec.joint_state if text is not None]
        names += [
            name
            for name in OPTIONAL
            if name in info.features and name not in (*info.videos, *info.refused)
        ]
        return list(dict.fromkeys(name for name in names if name != TASK))

    def _groups(self, ids: Int64[NpArray, " e"]) -> Int64[NpArray, " e"]:
        # Single episodes: those of a file may all be of one task.
        return ids

    def _read(self, ids: Int64[NpArray, " e"]) -> Iterator[EncodedEpisode | None]:
        for index in ids.tolist():
            yield self._to_episode(index)

    def outlines(
        self, ids: Sequence[int] | Int64[NpArray, " e"], *, gripper: bool
    ) -> Iterator[Outline]:
        """As `EpisodeSource.outlines`; reads rows only where the tables do not say."""
        for index in self._checked(ids).tolist():
            place = self._of_split[index]
            tasks = self._episodes.tasks[place]
            if gripper or self.spec.instruction != TASK or len(tasks) != 1:
                yield from super().outlines([index], gripper=gripper)
            elif kept := kept_steps(self.spec, int(self._episodes.lengths[place])):
                yield Outline(id=index, length=len(kept), instruction=tasks[0], gripper=None)

    def file_hashes(self, ids: Sequence[int] | None = None) -> dict[str, str]:
        """The sha256 of each file that episodes are made of, by its path in the data set."""
        files = self._files(self._checked(ids if ids is not None else range(self.num_episodes)))
        hashes = {}
        for name in files:
            self._check_there(name)
            hashes[name] = digest(self.path / name)
        return hashes

    def fingerprint(self) -> str:
        """A quick hash of the split: descriptions, file sizes, and both ends of every file."""
        hashed = hashlib.sha256(self.split.encode())
        for name in self._files(np.arange(self.num_episodes)):
            self._check_there(name)
            sample(self.path / name, name, hashed)
        return hashed.hexdigest()

    def _files(self, ids: Int64[NpArray, " e"]) -> list[str]:
        """The descriptions, and the files that hold rows and frames of episodes."""
        described = (DESCRIPTIONS[LEROBOT], tasks_file(self._info), *self._episodes.described)
        tables = [self._episodes.files, *(v.files for v in self._episodes.videos.values())]
        places = [self._of_split[index] for index in ids.tolist()]
        return list(
            dict.fromkeys([*described, *(table[place] for table in tables for place in places)])
        )

    def _check_there(self, name: str) -> None:
        ensure(Path(self.path / name))
        if not (self.path / name).exists():
            raise DatasetError(
                f"{self.path / name}: missing; split {self.split!r} needs it; copy the data set "
                "again"
            )

    def _to_episode(self, index: int) -> EncodedEpisode | None:
        name = f"{self.path}: episode {index} of {self.split!r}"
        place = self._of_split[index]
        steps, start = (int(a[place]) for a in (self._episodes.lengths, self._episodes.rows))
        rows = range(start, start + steps)
        try:
            columns = self._read_columns(place, rows)
            return standardize(
                self.spec,
                lambda path: (
                    columns[path] if path in columns else self._camera(path, place, rows, columns)
                ),
                steps,
                name=name,
                episode_id=index,
                metadata={_INDEX: place, "tasks": list(self._episodes.tasks[place])},
                features=self._info.features,
            )
        except DatasetError as error:
            raise DatasetError(f"{name}: {error}") from error

    def _read_columns(self, place: int, rows: range) -> dict[str, Any]:
        """The numbers and texts of an episode, its instructions among them."""
        file = self._episodes.files[place]
        table = self._rows.read(file, rows, self._columns, all_rows=not self._info.by_file)
        columns = {
            name: values(table.column(name), name, self._info.features[name])
            for name in self._columns
        }
        for name, expected in ((_INDEX, np.full(len(rows), place)), (_STEP, np.arange(len(rows)))):
            if len(wrong := np.flatnonzero(columns[name] != expected)):
                step = int(wrong[0])
                raise DatasetError(
                    f"step {step}: {name} is {columns[name][step]} in row {rows[step]} of {file}, "
                    f"expected {expected[step]}; rows do not fit the table of episodes"
                )
        if self.spec.instruction == TASK:
            columns[TASK] = self._instructions(place, columns[_TASK_INDEX])
        return columns

    def _instructions(self, place: int, indices: Any) -> list[str]:
        texts = []
        for step, index in enumerate(indices):
            text = self._tasks.get(int(index))
            if text is None:
                raise DatasetError(
                    f"step {step}: {_TASK_INDEX} is {index}, which {tasks_file(self._info)} does "
                    "not have"
                )
            if text not in self._episodes.tasks[place]:
                raise DatasetError(
                    f"step {step}: {_TASK_INDEX} is {index}, {text!r}, which the table of episodes "
                    f"does not list ({', '.join(self._episodes.tasks[place]) or 'none'})"
                )
            texts.append(text)
        return texts

    def _camera(
        self, path: str, place: int, rows: range, columns: Mapping[str, Any]
    ) -> LazyPictures:
        if path not in self._videos:
            return StoredPictures(self._rows, self._episodes.files[place], rows, path)
        videos = self._episodes.videos[path]
        times = columns[_TIME].astype(np.float64)
        start, end = float(videos.start[place]), float(videos.end[place])
        # Written so that NaN also fails.
        fits = (np.diff(times, prepend=-np.inf) > 0) & (times >= 0)
        fits &= start + times < end - TOLERANCE
        if not fits.all():
            step = int(np.argmin(fits))
            raise DatasetError(
                f"step {step}: {_TIME} is {times[step]:g} s; expected times that rise from step to "
                f"step, from 0 to the end of the episode in its video ({path}, {start:g} to "
                f"{end:g} s)"
            )
        return VideoFrames(self.path / videos.files[place], start + times)


def _public_name(path: epath.Path) -> str:
    """The name that a data set seems to have on the Hub, by where it lies.

    The last two directories, or what the cache of huggingface_hub makes of the name.
    """
    parts = path.parts if "://" in str(path) else path.resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("datasets--"):
        return parts[-3].removeprefix("datasets--").replace("--", "/")
    return "/".join(parts[-2:])
