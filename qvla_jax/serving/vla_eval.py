"""The model server's side of vla-eval's protocol (version 1; vla-eval 0.8).

Messages are msgpack maps of `type`, `payload`, `seq` and `timestamp`. The client speaks first
(`hello`), tells of the start and the end of an episode, and gets one action for each observation:
the steps of a chunk one after the other, and a new chunk once the steps that are executed are used
up. An action and an error have the `seq` of what they answer.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qvla_jax import __version__
from qvla_jax.errors import InputError, QvlaError
from qvla_jax.families.observations import ObservationSpec
from qvla_jax.serving import msgpack_numpy
from qvla_jax.serving.policies import ServedPolicy
from qvla_jax.serving.service import Service

PROTOCOL_VERSION: Final = 1
_TYPES: Final = ("hello", "episode_start", "observation", "episode_end", "error")


@dataclasses.dataclass(frozen=True)
class _Envelope:
    type: str
    payload: Mapping[str, Any]
    seq: int
    timestamp: Any


class VlaEvalConversation:
    """A connection of vla-eval: its episodes come one after the other."""

    def __init__(self, service: Service, served: ServedPolicy) -> None:
        """Asks `served` for answers."""
        self._service = service
        self._served = served
        # Of the running episode: steps of the chunk that are left, and the text for the next call.
        self._steps: list[np.ndarray] = []
        self._history: str | None = None

    def greeting(self) -> None:
        """Nothing: the client speaks first."""
        return

    async def reply(self, message: bytes, *, received: float, last: float | None) -> bytes | None:
        """Answers a greeting or an observation, and takes note of the rest."""
        try:
            envelope = await self._service.in_thread(lambda: _opened(message))
        except InputError as error:
            self._service.counters.refused += 1
            return self.refusal(str(error))
        if envelope.type == "hello":
            return self._hello(envelope)
        if envelope.type != "observation":
            self._steps, self._history = [], None
            return None
        try:
            if not self._steps:
                await self._infer(envelope, received)
        except QvlaError as error:
            return _message("error", {"error": str(error)}, envelope.seq)
        return _message("action", {"actions": self._steps.pop(0)}, envelope.seq)

    def refusal(self, text: str) -> bytes:
        """An error about a message that could not be read."""
        return _message("error", {"error": text}, 0)

    async def _infer(self, envelope: _Envelope, received: float) -> None:
        """Fills the steps."""
        spec = self._served.policy.observation
        answer = await self._service.answer(
            self._served,
            lambda sent: _entries(sent, spec, self._history),
            envelope,
            received=received,
        )
        executed = self._served.policy.layout.executed_steps
        self._steps = list(answer.actions[:executed].astype(np.float32))
        self._history = answer.history

    def _hello(self, envelope: _Envelope) -> bytes:
        version = envelope.payload.get("protocol_version")
        if type(version) is not int or version != PROTOCOL_VERSION:
            self._service.counters.refused += 1
            return _message(
                "error",
                {
                    "error": f"protocol version {version!r:.20}, expected {PROTOCOL_VERSION}: use "
                    "vla-eval 0.8"
                },
                envelope.seq,
            )
        spec = self._served.policy.observation
        parameters: dict[str, bool] = {}
        if len(spec.cameras) > 1:
            parameters["send_wrist_image"] = True
        if spec.state_dim:
            # The axis-angle of robosuite, with which the data of LIBERO were made.
            parameters |= {"send_state": True, "quat_no_antipodal": True}
        reply = {
            "protocol_version": PROTOCOL_VERSION,
            "model_server": f"qvla_jax {__version__}",
            "capabilities": {},
            "observation_params": parameters,
            "action_spec": self._action_spec(),
            "policy": self._service.metadata(self._served),
        }
        return _message("hello", reply, envelope.seq)

    def _action_spec(self) -> dict[str, Any]:
        """What vla-eval compares with what the benchmark takes, in its own words."""
        policy = self._served.policy
        spec, layout = policy.observation, policy.layout
        if spec.from_client is not None or layout.grippers != (6,) or policy.config.action_dim != 7:
            return {"actions": {"name": "raw", "dims": 0, "format": "raw"}}
        libero = self._service.config.gripper == "libero"
        return {
            "position": _dimensions("position", 3, "delta_xyz", (-1, 1)),
            "rotation": _dimensions("rotation", 3, "axis_angle", (-3.15, 3.15)),
            "gripper": _dimensions("gripper", 1, "binary_close_positive", (-1, 1))
            if libero
            else _dimensions("gripper", 1, "continuous_01", (0, 1)),
        }


def _dimensions(name: str, count: int, form: str, limits: tuple[float, float]) -> dict[str, Any]:
    return {"name": name, "dims": count, "format": form, "range": limits}


def _opened(message: bytes) -> _Envelope:
    content = msgpack_numpy.decode(message)
    if missing := [key for key in ("type", "payload", "seq", "timestamp") if key not in content]:
        raise InputError(f"message: no {missing[0]}; expected a message of vla-eval")
    kind, payload, seq = content["type"], content["payload"], content["seq"]
    if not isinstance(kind, str) or kind not in _TYPES:
        raise InputError(f"message: type {kind!r:.60}; expected {', '.join(_TYPES)}")
    if not isinstance(payload, dict) or not all(isinstance(key, str) for key in payload):
        raise InputError("message: payload: expected a map with text for keys")
    if type(seq) is not int:
        raise InputError(f"message: seq: expected a whole number, got {type(seq).__name__}")
    return _Envelope(kind, payload, seq, content["timestamp"])


def _entries(envelope: _Envelope, spec: ObservationSpec, history: str | None) -> dict[str, Any]:
    """A benchmark's observation in our words: its cameras are taken in its own order."""
    payload = envelope.payload
    images = payload.get("images")
    needed = [camera for camera in spec.cameras if camera not in spec.optional]
    if not isinstance(images, dict) or len(images) < len(needed):
        held = ", ".join(map(str, images))[:300] if isinstance(images, dict) else "none"
        raise InputError(
            f"images: {held}; the policy takes {len(needed)} of them ({', '.join(needed)}), a map "
            "from cameras to pictures"
        )
    entries: dict[str, Any] = dict(zip(spec.cameras, images.values(), strict=False))
    if spec.state_dim:
        for name in ("states", "state"):
            if name in payload:
                entries["state"] = payload[name]
                break
    if "task_description" in payload:
        entries["instruction"] = payload["task_description"]
    if history is not None:
        entries["history"] = history
    return {**entries, "captured_at": envelope.timestamp}


def _message(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    content = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    return msgpack_numpy.encode(content, text_keys=True)
