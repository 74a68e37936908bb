"""The tables of a LeRobot data set: its tasks, and where the rows and frames of an episode are.

They are small beside the data: lengths and instructions come from them, without reading any row.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from etils import epath

from qvla_jax.array_typing import Float64, Int64, NpArray
from qvla_jax.data.lerobot.info import Info
from qvla_jax.data.lerobot.parquet import check_columns, opened
from qvla_jax.errors import DatasetError

_TASKS: Final = {False: "meta/tasks.jsonl", True: "meta/tasks.parquet"}
_EPISODES: Final = {False: "meta/episodes.jsonl", True: "meta/episodes/*/*.parquet"}
# The index of a table that pandas wrote without a name.
_UNNAMED: Final = "__index_level_0__"


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Where the frames of a video feature are, for each episode.

    Attributes:
        files: relative to the data set.
        start: and `end`: seconds on the file's own time line; the end is infinite where a file
            holds one episode.
    """

    files: list[str]
    start: Float64[NpArray, " e"]
    end: Float64[NpArray, " e"]


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """The episodes of a data set, by their index.

    Attributes:
        lengths: steps of each.
        tasks: the tasks of each, in no particular order.
        files: the file with its rows, relative to the data set; `rows` the first of them there.
        videos: by feature.
        described: files that the tables were read from, relative to the data set.
    """

    lengths: Int64[NpArray, " e"]
    tasks: list[tuple[str, ...]]
    files: list[str]
    rows: Int64[NpArray, " e"]
    videos: Mapping[str, Videos] = field(default_factory=dict)
    described: tuple[str, ...]


def read_tasks(info: Info) -> dict[int, str]:
    """The tasks in words, by their index.

    Raises:
        DatasetError: the table cannot be read, or does not hold as many as meta/info.json states.
    """
    path = info.path / tasks_file(info)
    if info.by_file:
        with opened(path) as file:
            names = file.schema_arrow.names
            text = _UNNAMED if "task" not in names and _UNNAMED in names else "task"
            check_columns(path, file, ["task_index", text])
            table = file.read(columns=["task_index", text], use_threads=False).to_pydict()
        pairs = list(zip(table["task_index"], table[text], strict=True))
    else:
        lines = _lines(path, {"task_index": int, "task": str})
        pairs = [(line["task_index"], line["task"]) for line in lines]
    tasks = {index: text for index, text in pairs if isinstance(index, int)}
    if len(tasks) != len(pairs) or not all(isinstance(text, str) for text in tasks.values()):
        raise DatasetError(f"{path}: expected tasks as text, each with an index of its own")
    if len(tasks) != info.total_tasks:
        raise DatasetError(
            f"{path}: holds {len(tasks)} tasks, meta/info.json counts {info.total_tasks} "
            "(total_tasks); copy the data set again"
        )
    return tasks


def tasks_file(info: Info) -> str:
    """The table of tasks, relative to the data set."""
    return _TASKS[info.by_file]


def read_episodes(info: Info, videos: Collection[str]) -> Episodes:
    """Reads the table of episodes.

    Args:
        info: what the data set declares.
        videos: the video features whose files are needed.

    Raises:
        DatasetError: it cannot be read, lacks a column, or does not hold what meta/info.json
            counts.
    """
    episodes = _by_file(info, videos) if info.by_file else _by_episode(info, videos)
    where = f"{info.path / 'meta'}"
    for what, found, declared in (
        ("episodes", len(episodes.lengths), info.total_episodes),
        ("frames", int(episodes.lengths.sum()), info.total_frames),
    ):
        if found != declared:
            raise DatasetError(
                f"{where}: the table of episodes holds {found} {what}, info.json counts "
                f"{declared} (total_{what}); copy the data set again"
            )
    return episodes


def _by_episode(info: Info, videos: Collection[str]) -> Episodes:
    """v2: a file for each episode and camera."""
    name = _EPISODES[False]
    path = info.path / name
    lines = _lines(path, {"episode_index": int, "length": int, "tasks": list})
    lines.sort(key=lambda line: line["episode_index"])
    _check_indices(path, [line["episode_index"] for line in lines])
    lengths = _lengths(path, [line["length"] for line in lines])
    numbers = [
        {"episode_chunk": index // info.chunks_size, "episode_index": index}
        for index in range(len(lines))
    ]
    return Episodes(
        lengths=lengths,
        tasks=[_task_names(path, line["tasks"], i) for i, line in enumerate(lines)],
        files=[info.data_file(**each) for each in numbers],
        rows=np.zeros(len(lines), np.int64),
        videos={
            feature: Videos(
                files=[info.video_file(feature, **each) for each in numbers],
                start=np.zeros(len(lines)),
                end=np.full(len(lines), np.inf),
            )
            for feature in videos
        },
        described=(name,),
    )


def _by_file(info: Info, videos: Collection[str]) -> Episodes:
    """v3.0: files with many episodes."""
    paths = sorted(info.path.glob(_EPISODES[True]))
    if not paths:
        raise DatasetError(
            f"{info.path}: no files {_EPISODES[True]}; copy the data set again, or convert it "
            "with the lerobot package"
        )
    columns = ["episode_index", "length", "tasks", "dataset_from_index", "dataset_to_index"]
    columns += ["data/chunk_index", "data/file_index"]
    for feature in videos:
        columns += [f"videos/{feature}/{name}" for name in _VIDEO_COLUMNS]
    table: dict[str, list[Any]] = {column: [] for column in columns}
    for path in paths:
        with opened(path) as file:
            check_columns(path, file, columns)
            part = file.read(columns=columns, use_threads=False)
            for column in columns:
                table[column] += part.column(column).to_pylist()
    where = paths[0].parent.parent
    for column in columns:
        kind: Any = list if column == "tasks" else int
        if column.endswith("_timestamp"):
            kind = int | float
        bad = [i for i, value in enumerate(table[column]) if not isinstance(value, kind)]
        if bad:
            raise DatasetError(f"{where}: {column} of row {bad[0]} is {table[column][bad[0]]!r}")
    order = np.argsort(np.asarray(table["episode_index"], np.int64), kind="stable").tolist()
    table = {column: [values[i] for i in order] for column, values in table.items()}
    _check_indices(where, table["episode_index"])
    lengths = _lengths(where, table["length"])
    first = np.asarray(table["dataset_from_index"], np.int64)
    count = np.asarray(table["dataset_to_index"], np.int64) - first
    if len(wrong := np.flatnonzero(count != lengths)):
        raise DatasetError(
            f"{where}: episode {wrong[0]} has {lengths[wrong[0]]} steps (length), and "
            f"{count[wrong[0]]} rows from dataset_from_index to dataset_to_index"
        )
    files = _files(table, "data", lambda **numbers: info.data_file(**numbers))
    starts: dict[str, int] = {}
    for file, row in zip(files, first.tolist(), strict=True):
        starts[file] = min(row, starts.get(file, row))
    return Episodes(
        lengths=lengths,
        tasks=[_task_names(where, names, i) for i, names in enumerate(table["tasks"])],
        files=files,
        rows=first - np.asarray([starts[file] for file in files], np.int64),
        videos={
            feature: Videos(
                files=_files(
                    table,
                    f"videos/{feature}",
                    lambda feature=feature, **numbers: info.video_file(feature, **numbers),
                ),
                start=np.asarray(table[f"videos/{feature}/from_timestamp"], np.float64),
                end=np.asarray(table[f"videos/{feature}/to_timestamp"], np.float64),
            )
            for feature in videos
        },
        described=tuple(str(path.relative_to(info.path)) for path in paths),
    )


_VIDEO_COLUMNS: Final = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


def _files(table: Mapping[str, list[Any]], group: str, name: Any) -> list[str]:
    pairs = zip(table[f"{group}/chunk_index"], table[f"{group}/file_index"], strict=True)
    return [name(chunk_index=chunk, file_index=file) for chunk, file in pairs]


def _task_names(where: epath.Path, names: list[Any], index: int) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{where}: tasks of episode {index} are {names!r}, expected texts")
    return tuple(names)


def _check_indices(where: epath.Path, found: list[int]) -> None:
    """Checks that episodes are counted from 0 on without a gap."""
    if found != list(range(len(found))):
        wrong = next(i for i, index in enumerate(found) if index != i)
        raise DatasetError(
            f"{where}: expected an episode {wrong}, found {found[wrong]}; episode_index must count "
            "from 0 on without a gap"
        )


def _lengths(where: epath.Path, found: list[int]) -> Int64[NpArray, " e"]:
    lengths = np.asarray(found, np.int64)
    if len(empty := np.flatnonzero(lengths < 1)):
        raise DatasetError(f"{where}: episode {empty[0]} has {lengths[empty[0]]} steps")
    return lengths


def _lines(path: epath.Path, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object in each line, with entries of some kinds."""
    return list(_parsed(path, kinds))


def _parsed(path: epath.Path, kinds: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise DatasetError(f"{path}: missing; copy the data set again")
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}: line {number} cannot be read as JSON ({error})") from error
        for key, kind in kinds.items():
            value = line.get(key) if isinstance(line, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise DatasetError(
                    f"{path}: line {number}: {key} is {value!r}, expected {kind.__name__}"
                )
        yield line
