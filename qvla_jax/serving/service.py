"""What both protocols share: from a message to an answer."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from qvla_jax import __version__, devices
from qvla_jax.data.libero.environment import libero_action
from qvla_jax.errors import InputError, PolicyError
from qvla_jax.inference import Policy
from qvla_jax.serving.batching import Answer, Batcher
from qvla_jax.serving.config import ServeConfig
from qvla_jax.serving.counters import Counters
from qvla_jax.serving.observations import ObservationReader

logger = logging.getLogger(__name__)

Message = TypeVar("Message")
# Health checks fail if a call of the policy takes longer than this.
_STALLED = 60.0


class Service:
    """A policy and the settings it is served with.

    Attributes:
        closing: no new requests are accepted.
    """

    def __init__(
        self,
        policy: Policy,
        config: ServeConfig,
        *,
        token: str | None = None,
        key_needed: bool = False,
    ) -> None:
        """Prepares; the batcher is warmed up and started by the server.

        Raises:
            InputError: the gripper cannot be converted: clients take the policy's own.
        """
        if config.gripper != "policy" and policy.observation.from_client is not None:
            raise InputError(
                f"gripper {config.gripper!r}: clients of {policy.config.name} take its actions as "
                "they are"
            )
        self.policy = policy
        self.config = config
        self.token = token
        self.closing = False
        self.counters = Counters()
        self.batcher = Batcher(
            policy,
            max_batch=config.max_batch,
            window=1e-3 * config.batch_window_ms,
            observe=self.counters.observe,
        )
        self._read = ObservationReader(
            policy, max_image_side=config.max_image_side, key_needed=key_needed
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(
            min(4, devices.cores()), "qvla-prepare"
        )

    async def answer(
        self, decode: Callable[[Message], Mapping[str, Any]], message: Message
    ) -> Answer:
        """Decodes, checks, prepares and answers one message.

        Args:
            decode: turns the message into its entries; runs in a thread, like all preparation.
            message: the raw message.

        Raises:
            InputError: the message is wrong.
            PolicyError: the policy or the server failed; the reason is in the log.
        """
        try:
            seen = await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: self._read(decode(message))
            )
            answer = await self.batcher(seen.inputs, seen.policy, state=seen.state)
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
        if self.config.gripper == "libero":
            steps = np.stack([libero_action(step) for step in answer.actions])
            answer = dataclasses.replace(answer, actions=steps.astype(np.float32))
        return answer

    @property
    def stalled(self) -> bool:
        """Whether a call of the policy has been running for too long."""
        since = self.batcher.busy_since
        return since is not None and time.monotonic() - since > _STALLED

    def metadata(self) -> dict[str, Any]:
        """What clients learn on connecting: what to send, and what they get."""
        config, spec = self.policy.config, self.policy.observation
        return {
            "server": f"qvla_jax {__version__}",
            "policy": config.name,
            "quantized": self.policy.quantization is not None,
            "unnorm_key": self._read.unnorm_key,
            "unnorm_keys": list(self.policy.statistics),
            "images": list(spec.cameras),
            "state_dim": spec.state_dim,
            "gripper": self.config.gripper,
            "action_horizon": config.action_horizon,
            "action_dim": config.action_dim,
            "max_batch": self.config.max_batch,
            **spec.metadata,
        }

    async def stop(self) -> None:
        """Ends the batcher and the threads."""
        await self.batcher.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
