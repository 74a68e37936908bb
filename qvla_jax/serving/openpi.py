"""The openpi protocol: metadata on connecting, then one binary reply for each binary message.

The expectations of `openpi_client.WebsocketClientPolicy` (openpi-client 0.1.2): replies are msgpack
maps with `actions`, `server_timing` and `policy_timing`; a reply in text is an error, which the
client raises. Here the connection survives an error, and the next message is answered again.
"""

import dataclasses
from typing import Any

from qvla_jax.errors import QvlaError
from qvla_jax.serving import msgpack_numpy
from qvla_jax.serving.policies import ServedPolicy
from qvla_jax.serving.service import Service


class OpenpiConversation:
    """A connection of one of openpi's clients."""

    def __init__(self, service: Service, served: ServedPolicy) -> None:
        """Asks `served` for answers."""
        self._service = service
        self._served = served

    def greeting(self) -> bytes:
        """The metadata."""
        return msgpack_numpy.encode(self._service.metadata(self._served))

    async def reply(self, message: bytes, *, received: float, last: float | None) -> bytes | str:
        """Answers an observation."""
        try:
            answer = await self._service.answer(
                self._served, msgpack_numpy.decode, message, received=received
            )
        except QvlaError as error:
            return str(error)
        times = answer.times
        timing = {**dataclasses.asdict(times), "batch": answer.batch}
        if last is not None:
            timing["prev_total_ms"] = 1e3 * last
        reply: dict[str, Any] = {
            "actions": answer.actions,
            "server_timing": timing,
            "policy_timing": {"infer_ms": times.infer_ms},
        }
        if answer.history is not None:
            reply["history"] = answer.history
        return msgpack_numpy.encode(reply)

    def refusal(self, text: str) -> str:
        """An error, which the client raises."""
        return text
