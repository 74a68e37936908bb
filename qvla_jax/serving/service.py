"""What all protocols share: from a message to an answer."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from qvla_jax import devices
from qvla_jax.array_typing import Float
from qvla_jax.data.libero.environment import libero_action
from qvla_jax.errors import InputError, PolicyError
from qvla_jax.inference import Policy
from qvla_jax.serving.config import ServeConfig
from qvla_jax.serving.counters import Counters, Times
from qvla_jax.serving.observations import Observation
from qvla_jax.serving.policies import ServedPolicy, check_memory, named_policy

logger = logging.getLogger(__name__)

Message = TypeVar("Message")
Result = TypeVar("Result")
# Health checks fail if a call of the policy takes longer than this.
_STALLED = 60.0
# No time that anybody means, in seconds since 1970; larger numbers may not even be floats.
_FAR = 1e12


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to one message.

    Attributes:
        actions: as the client takes them.
        history: for UniVLA, the `history` of the episode's next observation.
        batch: observations in the call of the policy.
        times: where the time went.
    """

    actions: Float[np.ndarray, "h a"]
    history: str | None
    batch: int
    times: Times


class Service:
    """Policies and the settings they are served with.

    Attributes:
        closing: no new requests are accepted.
        policies: the first answers clients that name none.
    """

    def __init__(
        self,
        policy: Policy,
        config: ServeConfig,
        *,
        others: Mapping[str, Policy],
        token: str | None = None,
        key_needed: bool = False,
    ) -> None:
        """Prepares; the batchers are warmed up and started by the server.

        Args:
            policy: answers clients that name none; its name is that of its configuration.
            config: the settings.
            others: further policies by their names.
            token: what clients must send.
            key_needed: messages to the first policy must have `unnorm_key`.

        Raises:
            InputError: the gripper cannot be converted, two policies have one name, or the weights
                exceed the limit.
        """
        first = policy.config.name
        if first in others:
            raise InputError(f"also: {first} is the name of the first policy; choose another one")
        named = {first: policy, **others}
        check_memory(named, config.memory_limit_gib)
        self.config = config
        self.token = token
        self.closing = False
        self.counters = Counters()
        # One call at a time: policies of one machine would only slow each other down.
        self._device = concurrent.futures.ThreadPoolExecutor(1, "qvla-policy")
        self.policies = [
            ServedPolicy(
                name, each, config, thread=self._device, key_needed=key_needed and each is policy
            )
            for name, each in named.items()
        ]
        self._threads = concurrent.futures.ThreadPoolExecutor(
            min(4, devices.cores()), "qvla-prepare"
        )

    def named(self, query: Mapping[str, str]) -> ServedPolicy:
        """The policy that an address asks for; see `named_policy`."""
        return named_policy(self.policies, query)

    async def in_thread(self, function: Callable[[], Result]) -> Result:
        """Runs what would hold the connections up, such as decoding."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def answer(
        self,
        served: ServedPolicy,
        decode: Callable[[Message], Mapping[str, Any]],
        message: Message,
        *,
        received: float,
    ) -> Reply:
        """Decodes, checks, prepares and answers one message.

        Args:
            served: the policy that answers.
            decode: turns the message into its entries; runs in a thread, like all preparation.
            message: the raw message.
            received: when it was there, by `time.monotonic`.

        Raises:
            InputError: the message is wrong.
            PolicyError: the policy or the server failed; the reason is in the log.
        """

        def prepare() -> tuple[Observation, float | None]:
            entries = decode(message)
            asked = entries.get("policy", served.name)
            if not isinstance(asked, str) or asked != served.name:
                raise InputError(
                    f"policy: this address is that of {served.name}; ask another one with "
                    "?policy=NAME"
                )
            return served.read(entries), _captured_at(entries)

        try:
            seen, captured = await self.in_thread(prepare)
            prepared = time.monotonic()
            answer = await served.batcher(seen.inputs, seen.policy, state=seen.state)
        except InputError:
            self.counters.refused += 1
            raise
        except PolicyError:
            self.counters.failed += 1
            raise
        except Exception as error:
            self.counters.failed += 1
            logger.exception("an observation could not be prepared")
            raise PolicyError(f"the server failed ({type(error).__name__})") from error
        total = time.monotonic() - received
        times = Times(
            prepare_ms=1e3 * (prepared - received),
            queue_ms=answer.queue_ms,
            infer_ms=answer.infer_ms,
            total_ms=1e3 * total,
            age_ms=1e3 * (total if captured is None else time.time() - captured),
        )
        self.counters.observe(served.name, answer.batch, times)
        actions = answer.actions
        if self.config.gripper == "libero":
            actions = np.stack([libero_action(step) for step in actions]).astype(np.float32)
        return Reply(actions, answer.history, answer.batch, times)

    @property
    def stalled(self) -> bool:
        """Whether a call of a policy has been running for too long."""
        since = [served.batcher.busy_since for served in self.policies]
        return any(start is not None and time.monotonic() - start > _STALLED for start in since)

    def metadata(self, served: ServedPolicy) -> dict[str, Any]:
        """What clients learn on connecting: what to send, and what they get."""
        return {**served.metadata(), "policies": [each.name for each in self.policies]}

    async def stop(self) -> None:
        """Ends the batchers and the threads."""
        for served in self.policies:
            await served.batcher.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _captured_at(entries: Mapping[str, Any]) -> float | None:
    """When the client captured an observation, in seconds since 1970; None if it does not say."""
    value = entries.get("captured_at")
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(value) < _FAR:
        raise InputError(
            "captured_at: expected seconds since 1970, as time.time() has them, got "
            f"{type(value).__name__}"
        )
    return float(value)
