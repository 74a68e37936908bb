"""Videos of rollouts (H.264 in mp4, through PyAV, which the extra `libero` installs)."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvla_jax.atomic import atomic_path
from qvla_jax.errors import InputError
from qvla_jax.evaluation.episodes import Episode
from qvla_jax.evaluation.workers import Environment

if TYPE_CHECKING:  # Simulator processes need no JAX, which these annotations import.
    from qvla_jax.array_typing import NpArray, UInt8

# Every other step of a control loop of 20 Hz is shown.
_STRIDE, _CONTROL_RATE = 2, 20
# Small pictures are enlarged to about this height, because players blur them.
_HEIGHT = 256


def film(
    environment: Environment, episode: Episode, actions: Sequence[np.ndarray], path: Path
) -> None:
    """Replays an episode and writes a video of both cameras; see `workers.Keep`."""
    environment.reset(episode.initial_state, seed=episode.seed)
    frames = [_picture(environment)]
    for step, action in enumerate(actions, start=1):
        environment.step(action)
        if step % _STRIDE == 0 or step == len(actions):
            frames.append(_picture(environment))
    write_video(path, frames, rate=_CONTROL_RATE // _STRIDE)


def _picture(environment: Environment) -> np.ndarray:
    """Both cameras side by side."""
    return np.concatenate([environment.render(name) for name in ("image", "wrist_image")], axis=1)


def write_video(
    path: Path, frames: "Sequence[UInt8[NpArray, 'height width 3']]", *, rate: int
) -> None:
    """Writes an mp4 file that browsers play.

    Args:
        path: the file to write.
        frames: pictures of the same size.
        rate: frames per second.

    Raises:
        InputError: PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(
            "videos need PyAV: pip install 'qvla-jax[libero]', or leave them out with --no-videos"
        ) from error
    scale = max(1, _HEIGHT // frames[0].shape[0])
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate))
        height, width = (side * scale // 2 * 2 for side in frames[0].shape[:2])
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "20"}
        for picture in frames:
            large = np.repeat(np.repeat(picture, scale, axis=0), scale, axis=1)
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(large[:height, :width]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def has_video_writer() -> bool:
    """Tells whether videos can be written."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True
