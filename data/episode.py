"""What the readers yield: whole episodes, and single frames with the expert's next actions."""

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from qvla_jax.array_typing import Bool, Float32, Int64, NpArray, UInt8


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode, its arrays stacked over steps; ``t`` counts steps here.

    ``wrist_image``, ``state`` and ``joint_state`` are None where the data set has none; both images
    are None where they were not asked for.

    Attributes:
      id: Position of the episode in its split, whatever the process or the order of reading.
      instruction: The task in words, as stored.
      action: Translation (3), rotation (3) and gripper, 1 for open and 0 for closed; the data set's
        specification (`qvla_jax.data.open_x`) says what the first six mean.
      metadata: The episode's metadata as stored, text decoded.
    """

    id: int
    instruction: str
    image: UInt8[NpArray, "t height width 3"] | None
    wrist_image: UInt8[NpArray, "t height width 3"] | None
    state: Float32[NpArray, "t p"] | None
    joint_state: Float32[NpArray, "t j"] | None
    action: Float32[NpArray, "t 7"]
    reward: Float32[NpArray, " t"]
    discount: Float32[NpArray, " t"]
    is_terminal: Bool[NpArray, " t"]
    metadata: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.action)

    def frame(self, step: int, horizon: int) -> "Frame":
        """One step with the next ``horizon`` actions."""
        return Frame(
            episode=self.id,
            step=step,
            instruction=self.instruction,
            image=None if self.image is None else self.image[step],
            wrist_image=None if self.wrist_image is None else self.wrist_image[step],
            state=None if self.state is None else self.state[step],
            actions=self.action[next_steps(np.asarray([step]), len(self), horizon)[0]],
        )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One observation and the expert's next ``h`` actions, the last repeated past the end."""

    episode: int
    step: int
    instruction: str
    image: UInt8[NpArray, "height width 3"] | None
    wrist_image: UInt8[NpArray, "height width 3"] | None
    state: Float32[NpArray, " p"] | None
    actions: Float32[NpArray, "h 7"]


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """An episode whose images are still the files they are stored as, one for each step."""

    episode: Episode
    image: Sequence[bytes | NpArray]
    wrist_image: Sequence[bytes | NpArray] | None

    def only(self, steps: Collection[int]) -> "EncodedEpisode":
        """The same with the images of some steps alone; those of the others are empty."""

        def kept(files: Sequence[bytes | NpArray]) -> list[bytes | NpArray]:
            return [file if step in steps else b"" for step, file in enumerate(files)]

        wrist = None if self.wrist_image is None else kept(self.wrist_image)
        return replace(self, image=kept(self.image), wrist_image=wrist)

    def decode(self) -> Episode:
        """Decodes both cameras."""
        wrist = None if self.wrist_image is None else decode_images(self.wrist_image)
        return replace(self.episode, image=decode_images(self.image), wrist_image=wrist)


def next_steps(steps: Int64[NpArray, " f"], length: int, horizon: int) -> Int64[NpArray, "f h"]:
    """Indices of the ``horizon`` steps from each of ``steps`` on, the last one repeated."""
    return np.minimum(steps[:, None] + np.arange(horizon), length - 1)


def decode_images(files: Iterable[bytes | NpArray]) -> UInt8[NpArray, "t height width 3"]:
    """Decodes JPEG or PNG files of one size, in threads (the decoders release the GIL).

    Pictures that a data set stores as plain arrays are passed through.
    """
    return np.stack(list(_pool().map(_decode_image, files)))


def decode_each(
    files: Iterable[bytes | NpArray],
) -> UInt8[NpArray, "b height width 3"] | list[UInt8[NpArray, "height width 3"]]:
    """As `decode_images`, but a list where the pictures differ in size."""
    images = list(_pool().map(_decode_image, files))
    same = len({image.shape for image in images}) == 1
    return np.stack(images) if same else images


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="decode")


def _decode_image(data: bytes | NpArray) -> UInt8[NpArray, "height width 3"]:
    if isinstance(data, np.ndarray):
        return data
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
