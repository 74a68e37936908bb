"""Experts that open a drawer by its handle, and put a bowl into it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_jax.data.libero.experts.bowl import BowlExpert
from qvla_jax.data.libero.experts.motion import (
    CARRY_CAP,
    GAIN,
    REACH_CAP,
    TURNED,
    Phase,
    capped,
    opening_of,
    ramp,
    rotating,
    rotation_to,
)

if TYPE_CHECKING:
    from qvla_jax.array_typing import Float64, NpArray


@dataclass
class HandleExpert:
    """Pulls a drawer open: the gripper, nearly horizontal, takes the handle's bar and moves away.

    Attributes:
        handle: where the middle of the bar is.
        pull: direction in which the drawer opens, a unit vector in the world's xy.
        pose: orientation of the gripper, its approach (third column) against `pull`.
        phase: of the last action.
    """

    handle: Callable[[], "Float64[NpArray, ' 3']"]
    pull: "Float64[NpArray, ' 3']"
    pose: "Float64[NpArray, '3 3']"
    phase: Phase = "reach"

    # Distance from the bar until the gripper is in line with it, and, because the upper finger
    # would touch the drawer, while fingers are open (m).
    _standoff, _ahead = 0.10, 0.008
    _pull = 0.6
    # Fingers this close (m), but not closed, have the bar between them; wider than `_open` they are
    # open.
    _closed, _bar, _open = 0.008, 0.03, 0.077

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        inwards = self.pose[:, 2]
        opening = opening_of(state)
        ahead = self._ahead * ramp(opening, 0.02, 0.07)
        error = self.handle() + ahead * self.pull - state["robot0_eef_pos"]
        turn = rotation_to(state, self.pose)
        turned = float(np.abs(turn).max())
        action = rotating(turn)
        depth = float(error @ inwards)
        across = error - depth * inwards
        off = float(np.linalg.norm(across))
        if self.holds(state):
            self.phase = "carry"
            aside = error - (error @ self.pull) * self.pull
            action[:3] = capped(GAIN * aside + self._pull * self.pull, CARRY_CAP)
            action[6] = 1.0
            return action
        self.phase = "reach"
        # In line with the bar, and turned, before the fingers come near it.
        far = max(ramp(off, 0.008, 0.04), ramp(turned, 0.15, 0.4))
        advance = depth - self._standoff * far
        gate = 1.0 - ramp(-advance, 0.02, 0.06)
        action[:3] = capped(GAIN * (gate * across + advance * inwards), REACH_CAP)
        # Fingers that began to close go on; those that closed on nothing open again.
        closing = state["robot0_gripper_qvel"][0] < -0.005
        tolerance = 0.012 if opening > self._open else 0.020 if closing else 0.0
        if max(off, abs(depth)) < tolerance and turned < TURNED:
            self.phase = "close"
            action[6] = 1.0
        return action

    def holds(self, state: Mapping[str, Any]) -> bool:
        """Whether the bar is between closed fingers."""
        away = state["robot0_eef_pos"] - self.handle()
        still = np.abs(state["robot0_gripper_qvel"]).max() < 0.03
        closed = self._closed < opening_of(state) < self._bar
        return bool(np.linalg.norm(away) < 0.04 and still and closed)


@dataclass
class StowExpert:
    """Opens a drawer, as far as the bowl beside it allows, and puts the bowl in.

    Attributes:
        handle: opens the drawer.
        bowl: puts the bowl where the drawer is open.
        extent: how far the drawer is open (m).
        phase: of the last action.
    """

    handle: HandleExpert
    bowl: BowlExpert
    extent: Callable[[], float]
    phase: Phase = "reach"

    # The drawer (m) is pulled this far, is open enough for the bowl from here on, and for a bowl
    # that is held.
    _pulled, _enough, _least = 0.115, 0.105, 0.08
    # Distance from the handle before the gripper turns away.
    _away = 0.09
    # A bowl below this height over the handle keeps this far (m) from it, along the pull.
    _below, _clear = 0.015, 0.055

    def __call__(self, state: Mapping[str, Any]) -> "Float64[NpArray, ' 7']":
        """The action to take in a state."""
        pull, handle = self.handle.pull, self.handle.handle()
        extent, held = self.extent(), self.bowl.holds(state)
        pulls = self.handle.holds(state)
        enough = self._pulled if pulls else self._least if held else self._enough
        if extent < enough:
            action = self.handle(state)
            self.phase = self.handle.phase
            return action
        from_handle = state["robot0_eef_pos"] - handle
        if not held and np.linalg.norm(from_handle) < self._away:
            self.phase = "release"
            action = rotating(rotation_to(state, self.handle.pose))
            if not pulls:
                action[:3] = -REACH_CAP * self.handle.pose[:, 2]
            return action
        action = self.bowl(state)
        self.phase = self.bowl.phase
        bowl = state[f"{self.bowl.bowl}_pos"]
        short = self._clear - float((bowl - handle) @ pull)
        if self.phase == "carry" and bowl[2] < handle[2] + self._below and short > 0.0:
            # Beside the drawer, out of its way, before it is over it.
            upwards = np.array([0.0, 0.0, max(action[2], 0.0)])
            action[:3] = capped(GAIN * (short + 0.02) * pull + upwards, CARRY_CAP)
        return action
