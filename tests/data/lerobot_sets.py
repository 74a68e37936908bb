"""Small LeRobot sets of either layout, so that any part of one can be wrong.

`Parts` has what a set is made of; a test changes it and writes the set. Pictures are of one grey
value, (20 * episode + step) * 2 % 256, so that a frame of a video says which one it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .small_sets import file_of

TASKS = ("open the drawer", "put the bowl on the plate")
IMAGE, WRIST = "observation.images.image", "observation.images.image2"
STATE, ACTION = "observation.state", "action"
SIZE = (16, 24)

Columns = dict[str, list[Any]]


def grey(episode: int, step: int) -> int:
    return (20 * episode + step) * 2 % 256


def picture(episode: int, step: int) -> np.ndarray:
    return np.full((*SIZE, 3), grey(episode, step), np.uint8)


@dataclass
class Parts:
    """What a set is made of.

    Attributes:
        columns: the rows of each episode, without index columns of the whole set.
        tasks: in words.
        info: entries of meta/info.json that differ.
        features: entries of its features that differ; None leaves one out.
        episodes: entries of the table of episodes that differ, by episode.
        videos: whether pictures are frames of videos.
        start: where in seconds a video begins on its own time line.
    """

    columns: list[Columns]
    tasks: Sequence[str] = TASKS
    version: str = "v3.0"
    fps: int = 10
    videos: bool = False
    per_file: int = 2
    start: float = 0.0
    codec: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    episodes: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def by_file(self) -> bool:
        return self.version == "v3.0"

    @property
    def lengths(self) -> list[int]:
        return [len(columns["frame_index"]) for columns in self.columns]


def parts(lengths: Sequence[int] = (3, 5, 4), **options: Any) -> Parts:
    """Steps of random values, the same at each call; the gripper closes and opens in turn."""
    rng = np.random.default_rng(0)
    fps = options.get("fps", 10)
    columns = []
    for episode, length in enumerate(lengths):
        steps = range(length)
        columns.append(
            {
                STATE: rng.normal(size=(length, 8)).astype(np.float32).tolist(),
                ACTION: [
                    [*rng.uniform(-1, 1, 6).astype(np.float32).tolist(), (-1.0) ** t] for t in steps
                ],
                "timestamp": [t / fps for t in steps],
                "frame_index": [*steps],
                "episode_index": [episode] * length,
                "task_index": [episode % len(TASKS)] * length,
                IMAGE: [_stored(picture(episode, t)) for t in steps],
                WRIST: [_stored(255 - picture(episode, t)) for t in steps],
            }
        )
    return Parts(columns, **options)


# Cameras, and numbers with their sizes, of sets whose actions are those of joints.
JOINTS: dict[str, tuple[dict[str, str], dict[str, int]]] = {
    "lerobot/aloha_sim_insertion_human": (
        {"image": "observation.images.top"},
        {"action": 14, "observation.state": 14},
    ),
    "lerobot/aloha_mobile_shrimp": (
        {
            "image": "observation.images.cam_high",
            "left_wrist_image": "observation.images.cam_left_wrist",
            "right_wrist_image": "observation.images.cam_right_wrist",
        },
        {"action": 14, "observation.state": 14},
    ),
    "droid_joint_velocity": (
        {
            "image": "observation.images.exterior_1_left",
            "wrist_image": "observation.images.wrist_left",
        },
        {
            "action.joint_velocity": 7,
            "action.gripper_position": 1,
            "observation.state.joint_position": 7,
            "observation.state.gripper_position": 1,
        },
    ),
}


def joint_parts(spec: str, lengths: Sequence[int] = (4, 3)) -> Parts:
    """Those of a set whose actions are those of joints."""
    cameras, numbers = JOINTS[spec]
    made = parts(lengths)
    rng = np.random.default_rng(1)
    for columns in made.columns:
        pictures = [columns.pop(IMAGE), columns.pop(WRIST)]
        columns |= {f: pictures[camera != "image"] for camera, f in cameras.items()}
        del columns[STATE], columns[ACTION]
        for name, size in numbers.items():
            values = rng.normal(size=(len(columns["frame_index"]), size)).astype(np.float32)
            columns[name] = (values[:, 0] if size == 1 else values).tolist()
    made.features |= dict.fromkeys((IMAGE, WRIST, STATE, ACTION))
    made.features |= {n: {"dtype": "float32", "shape": [size]} for n, size in numbers.items()}
    made.features |= {f: {"dtype": "image", "shape": [16, 24, 3]} for f in cameras.values()}
    made.features["language_instruction"] = {"dtype": "string", "shape": [1]}
    for columns in made.columns:
        columns["language_instruction"] = ["fold the towel"] * len(columns["frame_index"])
    return made


def _stored(image: np.ndarray) -> dict[str, Any]:
    return {"bytes": file_of(image), "path": "frame.png"}


def write(folder: Path, made: Parts) -> Path:
    """Writes a set."""
    (folder / "meta").mkdir(parents=True)
    _write_json(folder / "meta" / "info.json", _info(made))
    rows = np.cumsum([0, *made.lengths]).tolist()
    table = [
        {
            "episode_index": e,
            "tasks": list({made.tasks[i]: i for i in c["task_index"] if i < len(made.tasks)}),
            "length": made.lengths[e],
        }
        for e, c in enumerate(made.columns)
    ]
    every = range(len(made.columns))
    groups = [every[i : i + made.per_file] for i in range(0, len(every), made.per_file)]
    for number, group in enumerate(groups if made.by_file else [[e] for e in every]):
        name = f"file-{number:03d}" if made.by_file else f"episode_{number:06d}"
        path = folder / "data" / "chunk-000" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(path, made, group)
        clip = 0
        for episode in group:
            table[episode] |= {"data/chunk_index": 0, "data/file_index": number}
            table[episode] |= {"dataset_from_index": rows[episode]}
            table[episode] |= {"dataset_to_index": rows[episode + 1]}
            for camera in _cameras(made):
                where = f"videos/{camera}"
                start = made.start + clip / made.fps
                table[episode] |= {f"{where}/chunk_index": 0, f"{where}/file_index": number}
                table[episode] |= {f"{where}/from_timestamp": start}
                table[episode][f"{where}/to_timestamp"] = start + made.lengths[episode] / made.fps
            clip += made.lengths[episode]
        for camera in _cameras(made):
            places = [(e, t) for e in group for t in range(made.lengths[e])]
            sign = -1 if camera == WRIST else 1
            frames = [picture(*place) if sign > 0 else 255 - picture(*place) for place in places]
            inner = f"{camera}/chunk-000" if made.by_file else f"chunk-000/{camera}"
            video = folder / "videos" / inner / f"{name}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            encode(video, frames, fps=made.fps, start=made.start, **made.codec)
    for episode, change in made.episodes.items():
        table[episode] |= change
    _write_tables(folder / "meta", made, table)
    return folder


def _cameras(made: Parts) -> tuple[str, ...]:
    return (IMAGE, WRIST) if made.videos else ()


def _write_rows(path: Path, made: Parts, group: Sequence[int]) -> None:
    """A row group for each episode, as lerobot writes them."""
    writer = None
    for episode in group:
        columns = {
            name: values
            for name, values in made.columns[episode].items()
            if not (made.videos and name in (IMAGE, WRIST))
        }
        rows = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
    assert writer is not None
    writer.close()


def _write_tables(folder: Path, made: Parts, table: list[dict[str, Any]]) -> None:
    tasks = [{"task_index": i, "task": text} for i, text in enumerate(made.tasks)]
    if not made.by_file:
        for name, lines in (("tasks", tasks), ("episodes", table)):
            kept = [{k: v for k, v in line.items() if "/" not in k} for line in lines]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            (folder / f"{name}.jsonl").write_text(text)
        return
    pq.write_table(pa.Table.from_pylist(tasks), folder / "tasks.parquet")
    # Two files, so that reading one is not enough.
    for number, part in enumerate((table[:1], table[1:])):
        path = folder / "episodes" / f"chunk-{number:03d}" / "file-000.parquet"
        path.parent.mkdir(parents=True)
        if part:
            pq.write_table(pa.Table.from_pylist(part), path)


def _info(made: Parts) -> dict[str, Any]:
    kind = "video" if made.videos else "image"
    camera = {"dtype": kind, "shape": [*SIZE, 3], "names": ["height", "width", "channel"]}
    number = {"dtype": "int64", "shape": [1], "names": None}
    features: dict[str, Any] = {
        IMAGE: camera,
        WRIST: camera,
        STATE: {"dtype": "float32", "shape": [8], "names": ["state"]},
        ACTION: {"dtype": "float32", "shape": [7], "names": ["actions"]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **dict.fromkeys(("frame_index", "episode_index", "task_index"), number),
        **made.features,
    }
    chunk = "chunk_index" if made.by_file else "episode_chunk"
    data = "file-{file_index:03d}" if made.by_file else "episode_{episode_index:06d}"
    inner = "{video_key}/chunk-" if made.by_file else "chunk-"
    video = f"videos/{inner}{{{chunk}:03d}}/{'' if made.by_file else '{video_key}/'}{data}.mp4"
    return {
        "codebase_version": made.version,
        "robot_type": "panda",
        "fps": made.fps,
        "features": {name: entry for name, entry in features.items() if entry is not None},
        "total_episodes": len(made.columns),
        "total_frames": sum(made.lengths),
        "total_tasks": len(made.tasks),
        "chunks_size": 1000,
        "data_path": f"data/chunk-{{{chunk}:03d}}/{data}.parquet",
        "video_path": video if made.videos else None,
        "splits": {"train": f"0:{len(made.columns)}"},
        **made.info,
    }


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree))


def encode(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    fps: int,
    start: float = 0.0,
    codec: str = "libx264",
    **options: str,
) -> None:
    """Writes a video whose first frame is at `start` seconds."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number + round(start * fps), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
