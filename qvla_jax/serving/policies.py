"""The policies of a server: each with its name, its reader of observations, and its batches."""

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from qvla_jax import __version__
from qvla_jax.errors import InputError, unknown
from qvla_jax.inference import Policy
from qvla_jax.serving.batching import Batcher
from qvla_jax.serving.config import ServeConfig
from qvla_jax.serving.observations import ObservationReader

# The part of an address that names a policy.
_PARAMETER = "policy"


class ServedPolicy:
    """A policy under the name that clients ask for it by.

    Attributes:
        name: its name.
        policy: what answers.
        batcher: runs it.
        read: prepares its observations.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        config: ServeConfig,
        *,
        thread: concurrent.futures.ThreadPoolExecutor,
        key_needed: bool = False,
    ) -> None:
        """Prepares; the batcher is warmed up and started by the server.

        Args:
            name: what clients ask for it by.
            policy: what answers.
            config: the server's settings.
            thread: runs the policies of the server, one after the other.
            key_needed: messages must have `unnorm_key`.

        Raises:
            InputError: the gripper cannot be converted: clients take the policy's own.
        """
        if config.gripper != "policy" and policy.observation.from_client is not None:
            raise InputError(
                f"gripper {config.gripper!r}: clients of {policy.config.name} take its actions as "
                "they are"
            )
        self.name = name
        self.policy = policy
        self._config = config
        self.batcher = Batcher(
            policy,
            max_batch=config.max_batch,
            window=1e-3 * config.batch_window_ms,
            thread=thread,
        )
        self.read = ObservationReader(
            policy, max_image_side=config.max_image_side, key_needed=key_needed
        )

    def metadata(self) -> dict[str, Any]:
        """What clients learn on connecting: what to send, and what they get."""
        config, spec = self.policy.config, self.policy.observation
        return {
            "server": f"qvla_jax {__version__}",
            "policy": self.name,
            "quantized": self.policy.quantization is not None,
            "unnorm_key": self.read.unnorm_key,
            "unnorm_keys": list(self.policy.statistics),
            "images": list(spec.cameras),
            "state_dim": spec.state_dim,
            "gripper": self._config.gripper,
            "action_horizon": config.action_horizon,
            "action_dim": config.action_dim,
            "max_batch": self._config.max_batch,
            **spec.metadata,
        }


def named_policy(served: Sequence[ServedPolicy], query: Mapping[str, str]) -> ServedPolicy:
    """The policy that an address asks for; the first if it names none.

    Args:
        served: the policies of the server.
        query: names and values behind the address's question mark.

    Raises:
        InputError: there is no such policy, or the address asks for something else.
    """
    if len(query) > 1 or (query and _PARAMETER not in query):
        asked = " and ".join(key[:60] for key in query)
        raise InputError(f"address: asks for {asked}; expected ?policy=NAME or nothing")
    name = query.get(_PARAMETER, served[0].name)
    for candidate in served:
        if candidate.name == name:
            return candidate
    raise InputError(unknown("policy", name[:60], [candidate.name for candidate in served]))


def weight_bytes(policy: Policy) -> int:
    """What the weights of a policy take in memory, in bytes."""
    leaves = jax.tree.leaves(nnx.state(policy.model))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray))


def check_memory(policies: Mapping[str, Policy], limit_gib: float | None) -> None:
    """Whether the weights of policies stay within what the user allows.

    Args:
        policies: by their names.
        limit_gib: for all of them together; None allows everything.

    Raises:
        InputError: they do not; the message has the numbers.
    """
    if limit_gib is None:
        return
    sizes = {name: weight_bytes(policy) / 2**30 for name, policy in policies.items()}
    if sum(sizes.values()) > limit_gib:
        listed = ", ".join(f"{name} {size:.3g}" for name, size in sizes.items())
        raise InputError(
            f"weights of {sum(sizes.values()):.3g} GiB ({listed}) exceed memory_limit_gib "
            f"{limit_gib:g}; serve fewer policies, pack them with fewer bits, or raise the limit"
        )
