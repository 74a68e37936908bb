"""The readers' results: whole episodes, and single frames with the expert's next actions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qvla_jax.array_typing import Bool, Float32, Int64, NpArray, UInt8
from qvla_jax.data.pictures import Pictures


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode, its arrays stacked over steps; `t` counts steps here.

    `wrist_image`, `state` and `joint_state` are None if the data set has none; both images are None
    if they were not requested.

    Attributes:
        id: position of the episode in its split, independent of the process and the order of
            reading.
        instructions: the task in words at each step, as stored; all are empty if the episode has
            none.
        action: translation (3), rotation (3) and gripper, 1 for open and 0 for closed; the data
            set's specification (`qvla_jax.data.open_x`) says what the first six mean.
        reward: and `discount` and `is_terminal`: as stored, if that is one number per step, else 0,
            1 and False. Nothing is computed from them.
        metadata: the episode's metadata as stored, text decoded.
    """

    id: int
    instructions: tuple[str, ...]
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

    @property
    def instruction(self) -> str:
        """The task in words, at the first step; it rarely changes."""
        return self.instructions[0]

    @property
    def labeled(self) -> bool:
        """Whether there are instructions; the public training code skips episodes without any."""
        return bool(self.instruction.strip())

    def frame(self, step: int, horizon: int) -> "Frame":
        """One step with the next `horizon` actions."""
        return Frame(
            episode=self.id,
            step=step,
            instruction=self.instructions[step],
            image=None if self.image is None else self.image[step],
            wrist_image=None if self.wrist_image is None else self.wrist_image[step],
            state=None if self.state is None else self.state[step],
            actions=self.action[next_steps(np.asarray([step]), len(self), horizon)[0]],
        )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One observation and the expert's next `h` actions, the last repeated past the end."""

    episode: int
    step: int
    instruction: str
    image: UInt8[NpArray, "height width 3"] | None
    wrist_image: UInt8[NpArray, "height width 3"] | None
    state: Float32[NpArray, " p"] | None
    actions: Float32[NpArray, "h 7"]


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """An episode whose pictures are still as they are stored."""

    episode: Episode
    image: Pictures
    wrist_image: Pictures | None

    def only(self, steps: Collection[int]) -> "EncodedEpisode":
        """The same with only the images of some steps; the others are empty."""
        wrist = None if self.wrist_image is None else self.wrist_image.only(steps)
        return replace(self, image=self.image.only(steps), wrist_image=wrist)

    def decode(self) -> Episode:
        """Decodes both cameras."""
        wrist = None if self.wrist_image is None else self.wrist_image.decode_all()
        return replace(self.episode, image=self.image.decode_all(), wrist_image=wrist)


def next_steps(steps: Int64[NpArray, " f"], length: int, horizon: int) -> Int64[NpArray, "f h"]:
    """Indices of the `horizon` steps from each of `steps` on, the last one repeated."""
    return np.minimum(steps[:, None] + np.arange(horizon), length - 1)
