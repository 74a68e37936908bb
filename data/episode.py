"""The readers' results: whole episodes, and single frames with the expert's next actions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Bool, Float32, Int64, NpArray, UInt8
from qvla_jax.data.pictures import Pictures

# The cameras that policies take, by their names in observations.
CAMERAS: Final = ("image", "wrist_image", "left_wrist_image", "right_wrist_image")


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode, its arrays stacked over steps; `t` counts steps here, `a` entries of an action.

    All images but the first, `state` and `joint_state` are None if the data set has none; all
    images are None if they were not requested.

    Attributes:
        id: position of the episode in its split, independent of the process and the order of
            reading.
        instructions: the task in words at each step, as stored; all are empty if the episode has
            none.
        action: translation (3), rotation (3) and gripper, 1 for open and 0 for closed, or the
            joints of the robot; the data set's specification (`qvla_jax.data.open_x`) says which,
            and what they mean.
        reward: and `discount` and `is_terminal`: as stored, if that is one number per step, else 0,
            1 and False. Nothing is computed from them.
        metadata: the episode's metadata as stored, text decoded.
    """

    id: int
    instructions: tuple[str, ...]
    image: UInt8[NpArray, "t height width 3"] | None
    wrist_image: UInt8[NpArray, "t height width 3"] | None
    left_wrist_image: UInt8[NpArray, "t height width 3"] | None = None
    right_wrist_image: UInt8[NpArray, "t height width 3"] | None = None
    state: Float32[NpArray, "t p"] | None
    joint_state: Float32[NpArray, "t j"] | None
    action: Float32[NpArray, "t a"]
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

    def cameras(self) -> dict[str, UInt8[NpArray, "t height width 3"]]:
        """The images that there are, by camera."""
        images = {name: getattr(self, name) for name in CAMERAS}
        return {name: image for name, image in images.items() if image is not None}

    def frame(self, step: int, horizon: int) -> "Frame":
        """One step with the next `horizon` actions."""
        images: dict[str, Any] = {name: image[step] for name, image in self.cameras().items()}
        return Frame(
            **images,
            episode=self.id,
            step=step,
            instruction=self.instructions[step],
            state=None if self.state is None else self.state[step],
            actions=self.action[next_steps(np.asarray([step]), len(self), horizon)[0]],
        )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One observation and the expert's next `h` actions, the last repeated past the end."""

    episode: int
    step: int
    instruction: str
    image: UInt8[NpArray, "height width 3"] | None = None
    wrist_image: UInt8[NpArray, "height width 3"] | None = None
    left_wrist_image: UInt8[NpArray, "height width 3"] | None = None
    right_wrist_image: UInt8[NpArray, "height width 3"] | None = None
    state: Float32[NpArray, " p"] | None
    actions: Float32[NpArray, "h a"]


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """An episode whose pictures are still as they are stored.

    Attributes:
        pictures: by camera; those that the data set has.
    """

    episode: Episode
    pictures: Mapping[str, Pictures]

    def only(self, steps: Collection[int]) -> "EncodedEpisode":
        """The same with only the images of some steps; the others are empty."""
        return replace(self, pictures={name: p.only(steps) for name, p in self.pictures.items()})

    def decode(self) -> Episode:
        """Decodes all cameras."""
        images: dict[str, Any] = {name: p.decode_all() for name, p in self.pictures.items()}
        return replace(self.episode, **images)


def next_steps(steps: Int64[NpArray, " f"], length: int, horizon: int) -> Int64[NpArray, "f h"]:
    """Indices of the `horizon` steps from each of `steps` on, the last one repeated."""
    return np.minimum(steps[:, None] + np.arange(horizon), length - 1)
