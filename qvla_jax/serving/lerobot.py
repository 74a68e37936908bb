"""A robot of LeRobot's asynchronous inference: what it may ask for, and which observation counts.

As LeRobot's own server has it, only the latest observation is kept, and of those that the robot can
wait for (it has actions left) the ones that tell nothing new are left out: a step that was answered
already, or a state close to that of the last answer.
"""

import asyncio
import collections
import contextlib
import time
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError, unknown
from qvla_jax.serving.lerobot_messages import (
    Instructions,
    Seen,
    read_instructions,
    read_observation,
    write_actions,
)
from qvla_jax.serving.policies import ServedPolicy
from qvla_jax.serving.service import Service

# Distance between two states below which the second tells nothing new, in the robot's units.
_SIMILAR: Final = 1.0
# Seconds that a request for actions waits for an observation.
_PATIENCE: Final = 2.0
# Seconds between the times that actions are marked with.
_STEP_SECONDS: Final = 1 / 30
# Answered steps that are remembered.
_STEPS: Final = 1000


class Robot:
    """One client, from its first call on.

    Attributes:
        calls: of the client that are being answered.
        used: when the last one ended, by `time.monotonic`.
        asked: what it asks for; None as long as it has not said.
    """

    def __init__(self, service: Service) -> None:
        """Asks `service` for answers, once `instruct` has said which policy's."""
        self.calls = 0
        self.used = time.monotonic()
        self.asked: Instructions | None = None
        self._service = service
        self._served: ServedPolicy | None = None
        self._waiting: tuple[Seen, Float[np.ndarray, " n"]] | None = None
        self._arrived = asyncio.Event()
        self._answered: collections.deque[int] = collections.deque(maxlen=_STEPS)
        self._last_state: Float[np.ndarray, " n"] | None = None

    def instruct(self, data: bytes) -> None:
        """Takes note of the policy and of the robot's features.

        Args:
            data: a pickled `RemotePolicyConfig`.

        Raises:
            InputError: there is no such policy, or it does not go together with the robot.
        """
        instructions = read_instructions(data)
        served = next((p for p in self._service.policies if p.name == instructions.policy), None)
        if served is None:
            names = [each.name for each in self._service.policies]
            raise InputError(
                f"pretrained_name_or_path: {unknown('policy', instructions.policy[:60], names)}"
            )
        _check(instructions, served)
        self.asked, self._served = instructions, served

    async def see(self, data: bytes) -> None:
        """Keeps an observation for the next request for actions, or leaves it out.

        Args:
            data: a pickled `TimedObservation`.

        Raises:
            InputError: it cannot be read, or has other entries than the robot's features.
        """
        instructions, _ = self._instructed()
        try:
            seen = await self._service.in_thread(lambda: read_observation(data))
            state = _state(seen, instructions)
        except InputError:
            self.lost()
            raise
        if not (seen.must_go or self._is_news(seen, state)):
            self._service.counters.skipped += 1
            return
        self._service.counters.skipped += self._waiting is not None
        self._waiting = seen, state
        self._arrived.set()

    async def actions(self) -> bytes:
        """The chunk for the latest observation, pickled; nothing if none comes for a while.

        Raises:
            InputError: the observation is wrong.
            PolicyError: the policy failed.
        """
        instructions, served = self._instructed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._arrived.wait()
        waiting, self._waiting = self._waiting, None
        self._arrived.clear()
        if waiting is None:
            return b""
        seen, state = waiting

        def entries(seen: Seen) -> dict[str, Any]:
            return _entries(seen, state, instructions, served)

        self._answered.append(seen.timestep)
        self._last_state = state
        try:
            reply = await self._service.answer(served, entries, seen, received=time.monotonic())
        except BaseException:
            self.lost()
            raise
        return write_actions(
            reply.actions[: instructions.steps],
            module=instructions.module,
            timestep=seen.timestep,
            timestamp=seen.timestamp,
            step_seconds=_STEP_SECONDS,
        )

    def lost(self) -> None:
        """Takes note that a message may not have arrived: the next observation counts.

        It could be without `must_go`, which a robot sends once for each answer.
        """
        self._last_state = None

    def wake(self) -> None:
        """Ends the wait for an observation."""
        self._arrived.set()

    def _instructed(self) -> tuple[Instructions, ServedPolicy]:
        if self.asked is None or self._served is None:
            raise InputError("expected SendPolicyInstructions before anything else")
        return self.asked, self._served

    def _is_news(self, seen: Seen, state: Float[np.ndarray, " n"]) -> bool:
        if self._last_state is None:
            return True
        if seen.timestep in self._answered:
            return False
        return not state.size or not np.linalg.norm(state - self._last_state) < _SIMILAR


def _check(instructions: Instructions, served: ServedPolicy) -> None:
    """Whether a robot has what a policy takes.

    Raises:
        InputError: it has not, or has cameras of other names.
    """
    spec = served.policy.observation
    if spec.has_history:
        raise InputError(
            f"{served.name} takes the history of whole chunks, and chunks that are asked for ahead "
            "are not executed whole"
        )
    if served.read.unnorm_key is None:
        raise InputError(
            f"{served.name} has statistics of several data sets, and this client cannot choose; "
            "start the server with --unnorm-key"
        )
    cameras, known = instructions.cameras, ", ".join(spec.cameras) or "none"
    if other := [name for name in cameras if name not in spec.cameras]:
        raise InputError(
            f"camera {other[0][:60]}: {served.name} has the cameras {known}; give the robot's "
            "cameras these names, and leave others out"
        )
    if missing := [n for n in spec.cameras if n not in cameras and n not in spec.optional]:
        raise InputError(f"the robot has no camera {missing[0]}; {served.name} takes {known}")
    if spec.state_dim and len(instructions.joints) != spec.state_dim:
        raise InputError(
            f"the robot's state has {len(instructions.joints)} entries, {served.name} takes "
            f"{spec.state_dim}"
        )


def _state(seen: Seen, instructions: Instructions) -> Float[np.ndarray, " n"]:
    """The robot's state f32[n], in the order of its features."""
    numbers: list[float] = []
    for name in instructions.joints:
        value = seen.values.get(name)
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, bool | int | float):
            raise InputError(f"observation: {name[:60]}: expected a number")
        numbers.append(value)
    try:
        return np.array(numbers, np.float64).astype(np.float32)
    except OverflowError as error:
        raise InputError(
            f"observation: the state holds a number that is too large ({error})"
        ) from error


def _entries(
    seen: Seen, state: Float[np.ndarray, " n"], instructions: Instructions, served: ServedPolicy
) -> dict[str, Any]:
    """A robot's observation in our words."""
    spec = served.policy.observation
    entries: dict[str, Any] = {"captured_at": seen.timestamp}
    for camera, name in instructions.cameras.items():
        if name not in seen.values:
            raise InputError(f"observation: no {name[:60]}, which is one of the robot's features")
        entries[camera] = seen.values[name]
    if spec.state_dim:
        entries["state"] = state
    task = seen.values.get("task", "")
    if task or "instruction" not in spec.optional:
        entries["instruction"] = task
    return entries
