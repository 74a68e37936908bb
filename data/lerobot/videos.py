"""Frames of videos, by their time.

A frame is wanted at a time of the file's own time line, which need not begin at 0. Decoding starts
at the key frame before it, and goes on to the last frame that is wanted.
"""

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from etils import epath

from qvla_jax.array_typing import Float64, NpArray
from qvla_jax.data.pictures import LazyPictures, Picture
from qvla_jax.errors import DatasetError, first_line
from qvla_jax.remote.folder import ensure

# How far in seconds a frame may lie from the time at which it is wanted.
TOLERANCE: Final = 1e-4
# Where wanted frames are further apart (s), decoding starts again at the key frame before the next.
_FAR: Final = 2.0


@dataclass(frozen=True, eq=False)
class VideoFrames(LazyPictures):
    """Frames of one file.

    Attributes:
        path: the file.
        times: seconds on its time line at which a frame must be.
    """

    path: epath.Path
    times: Float64[NpArray, " t"]

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, kept: slice) -> Self:
        return replace(self, times=self.times[kept])

    def only(self, steps: Collection[int]) -> Self:
        """The same: nothing is held of the frames."""
        return self

    def read(self, steps: Sequence[int]) -> list[bytes | NpArray | DatasetError]:
        """The frames of some steps, u8[height, width, 3]."""
        times = np.asarray([self.times[step] for step in steps])
        frames: dict[float, Picture] = {}
        try:
            found = _shown(self.path, np.unique(times), frames)
        except DatasetError as error:
            return [error] * len(steps)
        return [
            frames[time] if time in frames else DatasetError(self._missing(time, found))
            for time in times.tolist()
        ]

    def _missing(self, time: float, found: list[float]) -> str:
        if not found:
            return f"{self.path} has no frame at {time:.4f} s or later: it is too short"
        nearest = min(found, key=lambda other: abs(other - time))
        short = " (it is too short)" if nearest == max(found) and nearest < time else ""
        return (
            f"{self.path} has no frame within {TOLERANCE:g} s of {time:.4f} s, the nearest is at "
            f"{nearest:.4f} s{short}; times in the data set do not fit its video"
        )


def _shown(
    path: epath.Path, times: Float64[NpArray, " t"], frames: dict[float, Picture]
) -> list[float]:
    """Fills in the frames at ascending times; returns the times of those that were decoded."""
    av = _library()
    ensure(Path(path))
    if not path.exists():
        raise DatasetError(f"{path}: missing; copy the data set again")
    seen: list[float] = []
    try:
        remote = "://" in str(path)
        source = io.BytesIO(path.read_bytes()) if remote else str(path.resolve())
        # Other formats than the one that lerobot writes may open further files.
        with av.open(source, format="mp4") as container:
            if not container.streams.video:
                raise DatasetError(f"{path}: holds no video")
            stream = container.streams.video[0]
            gaps = np.flatnonzero(np.diff(times) > _FAR) + 1
            for wanted in np.split(times, gaps):
                for time, frame in _from_key_frame(container, stream, wanted):
                    seen.append(time)
                    near = wanted[np.abs(wanted - time) <= TOLERANCE]
                    if len(near):
                        picture = frame.to_ndarray(format="rgb24")
                        frames.update(dict.fromkeys(near.tolist(), picture))
    except DatasetError:
        raise
    except Exception as error:
        # Damaged files raise almost anything.
        first = first_line(error)
        raise DatasetError(
            f"{path}: cannot be decoded; it is truncated or damaged ({first}); copy the data set "
            "again"
        ) from error
    return seen


def _from_key_frame(
    container: Any, stream: Any, wanted: Float64[NpArray, " t"]
) -> Iterator[tuple[float, Any]]:
    """The frames from the key frame before the first wanted one to the last, with their times."""
    first, last = float(wanted[0]), float(wanted[-1])
    # One unit of time earlier: times are rounded.
    container.seek(int(first / stream.time_base) - 1, stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        time = float(frame.pts * stream.time_base)
        yield time, frame
        if time >= last - TOLERANCE:
            return


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise DatasetError("videos need PyAV: pip install 'qvla-jax[lerobot]'") from error
    return av
