"""Connections over websockets: one reply for each binary message, whatever the protocol in it."""

import asyncio
import time
from typing import Protocol

from aiohttp import WSCloseCode, WSMsgType, web

from qvla_jax.serving.service import Service

# Seconds between pings; a client that does not answer within half of that is disconnected.
_HEARTBEAT = 60.0


class Conversation(Protocol):
    """One connection's side of a protocol. Text replies are errors of openpi's protocol."""

    def greeting(self) -> bytes | None:
        """What the server says first."""
        ...

    async def reply(
        self, message: bytes, *, received: float, last: float | None
    ) -> bytes | str | None:
        """Answers a message; errors are replies, too. None: it needs no reply.

        Args:
            message: the raw message.
            received: when it was there, by `time.monotonic`.
            last: seconds that the previous reply took, with sending it.
        """
        ...

    def refusal(self, text: str) -> bytes | str:
        """An error message."""
        ...


class Websockets:
    """The open connections, to close when the server stops."""

    def __init__(self, service: Service) -> None:
        """Serves `service`."""
        self._service = service
        self._idle: set[web.WebSocketResponse] = set()

    async def __call__(
        self, request: web.Request, conversation: Conversation
    ) -> web.WebSocketResponse:
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
            await self._send(socket, conversation.greeting())
            await self._converse(socket, conversation)
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

    async def _converse(self, socket: web.WebSocketResponse, conversation: Conversation) -> None:
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
                reply = await conversation.reply(message.data, received=start, last=last)
            elif message.type is WSMsgType.TEXT:
                self._service.counters.refused += 1
                reply = conversation.refusal("expected a message in msgpack, got text")
            else:  # closed; by aiohttp if a frame is broken or too large
                self._service.counters.refused += message.type is WSMsgType.ERROR
                return
            await self._send(socket, reply)
            last = time.monotonic() - start
        await self._go_away(socket)

    async def _send(self, socket: web.WebSocketResponse, reply: bytes | str | None) -> None:
        async with asyncio.timeout(self._service.config.io_timeout):
            if isinstance(reply, str):
                await socket.send_str(reply)
            elif reply is not None:
                await socket.send_bytes(reply)

    async def _go_away(self, socket: web.WebSocketResponse) -> None:
        await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server is shutting down")
