"""meta/info.json: what a LeRobot data set declares of itself.

Everything in it is followed, or known to change nothing that is read, or refused by name.
"""

import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from etils import epath

from qvla_jax.data.location import DESCRIPTIONS, LEROBOT
from qvla_jax.data.open_x.features import Feature
from qvla_jax.errors import DatasetError, InputError, unknown
from qvla_jax.plain import from_plain

# The versions that are read. 2.0 differs from 2.1 in its statistics alone, which nobody reads here.
BY_EPISODE: Final = ("v2.0", "v2.1")
BY_FILE: Final = ("v3.0",)
# The task in words, which the tables of tasks and not the rows hold.
TASK: Final = "task"

_TEXT: Final = np.dtype(object)
# Columns of language annotations, one list of records in each step.
_LANGUAGE: Final = "language"
# Entries of a feature that are followed, and those that change nothing that is read: names of
# single entries, and where a converter took the feature from.
_FOLLOWED: Final = ("dtype", "shape", "names", "info", "video_info", "fps")
_IRRELEVANT: Final = ("name", "original_key", "description")
_SPLIT: Final = re.compile(r"(\d{1,12}):(\d{1,12})")
_PAD: Final = re.compile(r"(0\d{1,2}d)?")


@dataclass(frozen=True, kw_only=True)
class _Declared:
    """The entries of meta/info.json."""

    codebase_version: str
    fps: float
    features: Mapping[str, Any]
    splits: Mapping[str, str]
    total_episodes: int
    total_frames: int
    total_tasks: int
    data_path: str
    video_path: str | None = None
    chunks_size: int = 1000
    # Known to change nothing that is read: sizes at which the writer begins another file, counts
    # that follow from others, what describes the robot, and the rate that became fps (any4lerobot).
    data_files_size_in_mb: Any = None
    video_files_size_in_mb: Any = None
    total_videos: Any = None
    total_chunks: Any = None
    robot_type: Any = None
    control_frequency: Any = None
    tools: Any = None


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a data set declares.

    Attributes:
        path: the directory of the data set.
        version: such as v3.0.
        by_file: whether files hold many episodes (v3.0), and not one each.
        features: features of a step, by name, the task in words among them.
        videos: names of the features that are frames of videos.
        refused: why some features cannot be read, by name.
        splits: the episodes of each split.
    """

    path: epath.Path
    version: str
    by_file: bool
    features: Mapping[str, Feature]
    videos: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, range]
    total_episodes: int
    total_frames: int
    total_tasks: int
    chunks_size: int
    data_path: str
    video_path: str | None

    def data_file(self, **numbers: int) -> str:
        """A file of rows, relative to `path`, by the numbers that its version names files by."""
        return self.data_path.format(**numbers)

    def video_file(self, feature: str, **numbers: int) -> str:
        """A file of a video feature, in the same way."""
        return str(self.video_path).format(video_key=feature, **numbers)


def read_info(path: epath.Path) -> Info:
    """Reads meta/info.json of the data set at `path`.

    Raises:
        DatasetError: it cannot be read, is of another version, or declares something that is not
            known.
    """
    where = path / DESCRIPTIONS[LEROBOT]
    try:
        tree = json.loads(where.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: cannot be read as JSON ({error})") from error
    try:
        return _info(path, tree)
    except InputError as error:
        raise DatasetError(f"{where}: {error}") from error


def _info(path: epath.Path, tree: Any) -> Info:
    if not isinstance(tree, Mapping):
        raise DatasetError(f"expected an object, found {type(tree).__name__}")
    version, known = tree.get("codebase_version"), (*BY_EPISODE, *BY_FILE)
    if version not in known:
        raise DatasetError(
            f"codebase_version {version!r} is not read, only {', '.join(known)}; convert the data "
            "set with the lerobot package, or install a newer qvla-jax"
        )
    if other := sorted(set(tree) - set(_Declared.__dataclass_fields__)):
        raise DatasetError(
            f"{other[0]!r} is not known, and may change what is meant; if it does not, take it out"
        )
    declared: _Declared = from_plain(_Declared, tree, "it")
    by_file = version in BY_FILE
    if not (0 < declared.fps < float("inf") and declared.chunks_size > 0):
        raise DatasetError("fps and chunks_size must be positive")
    features: dict[str, Feature] = {}
    videos, refused = set(), {}
    for name, entry in declared.features.items():
        features[name], why = _feature(name, entry, declared.fps)
        if why is not None:
            refused[name] = why
        if entry["dtype"] == "video":
            videos.add(name)
    if TASK in features:
        raise DatasetError(f"a feature has the name {TASK!r}, which stands for the task in words")
    features[TASK] = Feature((), _TEXT)
    numbers = {"chunk_index", "file_index"} if by_file else {"episode_chunk", "episode_index"}
    _check_template("data_path", declared.data_path, numbers)
    if videos:
        if declared.video_path is None:
            raise DatasetError("there is no video_path, though there are features of videos")
        _check_template("video_path", declared.video_path, {*numbers, "video_key"})
    return Info(
        path=path,
        version=version,
        by_file=by_file,
        features=features,
        videos=frozenset(videos),
        refused=refused,
        splits={
            name: _split(name, text, declared.total_episodes)
            for name, text in declared.splits.items()
        },
        total_episodes=declared.total_episodes,
        total_frames=declared.total_frames,
        total_tasks=declared.total_tasks,
        chunks_size=declared.chunks_size,
        data_path=declared.data_path,
        video_path=declared.video_path,
    )


def _split(name: str, text: str, episodes: int) -> range:
    match = _SPLIT.fullmatch(text)
    if match is None or not 0 <= int(match[1]) < int(match[2]) <= episodes:
        raise DatasetError(
            f"split {name!r} is {text!r}; expected first:end of its episodes, such as "
            f"0:{episodes} for all"
        )
    return range(int(match[1]), int(match[2]))


def _check_template(name: str, template: str, numbers: set[str]) -> None:
    """Checks that a template names files of the data set by the numbers of its version."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DatasetError(f"{name} {template!r} is not a template ({error})") from error
    fields = {found for _, found, _, _ in parts if found is not None}
    plain = all(
        found is None or (_PAD.fullmatch(pad or "") and not conversion)
        for _, found, pad, conversion in parts
    )
    inside = not template.startswith("/") and ".." not in template.split("/")
    if fields - numbers or not plain or not inside or not fields:
        raise DatasetError(
            f"{name} {template!r}: expected a path inside the data set that is made of "
            f"{', '.join(f'{{{number}}}' for number in sorted(numbers))}"
        )


def _feature(name: str, entry: Any, fps: float) -> tuple[Feature, str | None]:
    """A feature, and why it cannot be read, if it cannot."""
    if not isinstance(entry, Mapping):
        raise DatasetError(f"feature {name!r}: expected an object, found {entry!r}")
    kind, shape = entry.get("dtype"), entry.get("shape", ())
    if not isinstance(kind, str) or not _is_shape(shape):
        raise DatasetError(
            f"feature {name!r}: expected a dtype and a shape, found {kind!r} and {shape!r}"
        )
    why = None
    other = sorted(set(entry) - {*_FOLLOWED, *_IRRELEVANT})
    if other:
        why = f"{other[0]!r} is not known, and may change what is meant; if not, take it out"
    if entry.get("fps", fps) != fps:
        why = f"it has {entry['fps']} steps per second, and the data set {fps:g}"
    sizes = tuple(shape)
    if kind in ("image", "video"):
        about = entry.get("info") or entry.get("video_info") or {}
        if not isinstance(about, Mapping):
            raise DatasetError(f"feature {name!r}: expected an object, found info {about!r}")
        if any(about.get(key) for key in ("is_depth_map", "video.is_depth_map")):
            why = "it holds depths, not pictures"
        return Feature(_channels_last(sizes, entry.get("names")), np.dtype(np.uint8), True), why
    if kind in ("string", _LANGUAGE):
        return Feature(sizes, _TEXT), why if kind == "string" else "it holds annotations"
    try:
        dtype = np.dtype(kind)
        if dtype.kind not in "biuf":
            raise TypeError
    except (TypeError, ValueError):
        known = ("image", "video", "string", "bool", "int64", "float32", "float64")
        return Feature(sizes, _TEXT), unknown("dtype", kind, known)
    return Feature(() if sizes == (1,) else sizes, dtype), why


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list | tuple) and all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape
    )


def _channels_last(shape: tuple[int, ...], names: Any) -> tuple[int, ...]:
    """Height, width and channels, whichever way round they are declared.

    Some writers give the names in another order than the sizes. Three channels tell; the names
    only where both ends are three.
    """
    if len(shape) != 3 or shape[0] != 3:
        return shape
    first = names[0] if isinstance(names, list | tuple) and names else None
    if shape[-1] == 3 and not (isinstance(first, str) and first.startswith("c")):
        return shape
    return (*shape[1:], shape[0])
