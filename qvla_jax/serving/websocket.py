"""The openpi protocol: metadata on connecting, then one binary reply for each binary message.

The expectations of `openpi_client.WebsocketClientPolicy` (openpi-client 0.1.2): replies are msgpack
maps with `actions`, `server_timing` and `policy_timing`; a reply in text is an error, which the
client raises. Here the connection survives an error, and the next message is answered again.
"""

import asyncio
import time
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from qvla_jax.errors import QvlaError
from qvla_jax.serving import msgpack_numpy
from qvla_jax.serving.service import Service

# Seconds between pings; a client that does not answer within half of that is disconnected.
_HEARTBEAT = 60.0


class Websockets:
    """The open connections, to close when the server stops."""

    def __init__(self, service: Service) -> None:
        """Serves `service`."""
        self._service = service
        self._idle: set[web.WebSocketResponse] = set()

    async def __call__(self, request: web.Request) -> web.WebSocketResponse:
        """Serves one connection until either side closes it."""
        config = self._service.config
        socket = web.WebSocketResponse(
            # aiohttp refuses messages of this size already.
            max_msg_size=config.max_message + 1,
            compress=False,
            heartbeat=_HEARTBEAT,
            receive_timeout=config.idle_timeout,
            timeout=2.0,
        )
        await socket.prepare(request)
        try:
            await self._send(socket, msgpack_numpy.encode(self._service.metadata()))
            await self._converse(socket)
        except (ConnectionError, TimeoutError):
            pass  # it has disconnected, or reads no replies
        finally:
            self._idle.discard(socket)
        return socket

    async def close(self) -> None:
        """Closes the connections that wait for a message; the others close after their reply."""
        await asyncio.gather(
            *(self._go_away(socket) for socket in list(self._idle)), return_exceptions=True
        )

    async def _converse(self, socket: web.WebSocketResponse) -> None:
        last: float | None = None
        while not self._service.closing:
            self._idle.add(socket)
            try:
                message = await socket.receive()
            except TimeoutError:
                await socket.close(code=WSCloseCode.GOING_AWAY, message=b"idle for too long")
                return
            finally:
                self._idle.discard(socket)
            start = time.monotonic()
            if message.type is WSMsgType.BINARY:
                reply = await self._reply(message.data, last)
            elif message.type is WSMsgType.TEXT:
                self._service.counters.refused += 1
                reply = "expected an observation in msgpack, got text"
            else:  # closed; by aiohttp if a frame is broken or too large
                self._service.counters.refused += message.type is WSMsgType.ERROR
                return
            await self._send(socket, reply)
            last = time.monotonic() - start
        await self._go_away(socket)

    async def _reply(self, message: bytes, last: float | None) -> bytes | str:
        start = time.monotonic()
        try:
            answer = await self._service.answer(msgpack_numpy.decode, message)
        except QvlaError as error:
            return str(error)
        timing = {
            "infer_ms": answer.infer_ms,
            "queue_ms": answer.queue_ms,
            "total_ms": 1e3 * (time.monotonic() - start),
            "batch": answer.batch,
        }
        if last is not None:
            timing["prev_total_ms"] = 1e3 * last
        reply: dict[str, Any] = {
            "actions": answer.actions,
            "server_timing": timing,
            "policy_timing": {"infer_ms": answer.infer_ms},
        }
        if answer.history is not None:
            reply["history"] = answer.history
        return msgpack_numpy.encode(reply)

    async def _send(self, socket: web.WebSocketResponse, reply: bytes | str) -> None:
        async with asyncio.timeout(self._service.config.io_timeout):
            if isinstance(reply, str):
                await socket.send_str(reply)
            else:
                await socket.send_bytes(reply)

    async def _go_away(self, socket: web.WebSocketResponse) -> None:
        await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server is shutting down")
