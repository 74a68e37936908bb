"""The port of LeRobot's asynchronous client: the calls of its gRPC service `AsyncInference`.

The clients of lerobot 0.3.3 to 0.6.1 call `Ready`, `SendPolicyInstructions`, then
`SendObservations` and `GetActions` at the same time. They know neither tokens nor TLS. A robot is
known by its connection; one that has lost it goes on with a new one.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from qvla_jax.errors import InputError, PolicyError, first_line
from qvla_jax.serving.lerobot import Robot
from qvla_jax.serving.service import Service

_SERVICE: Final = "transport.AsyncInference"
# Parts of an observation: the first, one between, the last (or the only one).
_BEGIN, _MIDDLE, _END = 1, 2, 3
# Of a part, beyond the data.
_FRAMING: Final = 1024
# Calls of one connection at the same time; a robot has two. More have to wait.
_CALLS: Final = 3
# Characters of an error: headers have room for little more.
_TEXT: Final = 1000

_Context = grpc.aio.ServicerContext


class LerobotPort:
    """Answers LeRobot's clients while it is open."""

    def __init__(self, service: Service) -> None:
        """Serves `service`."""
        self._service = service
        self._robots: dict[str, Robot] = {}
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def open(self, host: str, port: int) -> None:
        """Listens.

        Raises:
            InputError: it cannot.
        """
        config = self._service.config
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", config.max_message + _FRAMING),
                ("grpc.max_concurrent_streams", _CALLS),
                ("grpc.max_connection_idle_ms", int(1e3 * config.idle_timeout)),
                # Finds robots whose network is gone.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 30_000),
            ]
        )
        one, many = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        calls = {
            "Ready": one(self._call(self._ready, first=True)),
            "SendPolicyInstructions": one(self._call(self._instruct)),
            "SendObservations": many(self._call(self._see)),
            "GetActions": one(self._call(self._actions)),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, calls),)
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise InputError(
                f"cannot listen on {host} port {port} ({first_line(error)}); choose another "
                "--lerobot-port or --host"
            ) from error
        await self._server.start()

    def wake(self) -> None:
        """Ends the waits for observations."""
        for robot in self._robots.values():
            robot.wake()

    async def close(self) -> None:
        """Closes the connections; by then all calls are answered or have timed out."""
        if self._server is not None:
            await self._server.stop(None)

    def _call(
        self, answer: Callable[[Robot, Any], Awaitable[bytes]], *, first: bool = False
    ) -> Callable[[Any, _Context], Awaitable[bytes]]:
        """A call of the service, behind access control; errors get their status."""
        counters = self._service.counters

        async def call(request: Any, context: _Context) -> bytes:
            if self._service.closing:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            robot = self._robot(context.peer(), first=first)
            if not robot.calls and counters.clients >= self._service.config.max_clients:
                counters.turned_away += 1
                text = f"{counters.clients} clients are served already; try again later"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            counters.clients += not robot.calls
            robot.calls += 1
            try:
                return await answer(robot, request)
            except InputError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:_TEXT])
            except PolicyError as error:
                await context.abort(grpc.StatusCode.INTERNAL, str(error)[:_TEXT])
            finally:
                robot.calls -= 1
                robot.used = time.monotonic()
                counters.clients -= not robot.calls

        return call

    def _robot(self, peer: str, *, first: bool) -> Robot:
        """The robot of a connection, or the one that lost its connection; else a new one."""
        if not first and peer in self._robots:
            return self._robots[peer]
        idle = {name: robot for name, robot in self._robots.items() if not robot.calls}
        lost = [name for name in idle if _machine(name) == _machine(peer)]
        lost.sort(key=lambda name: idle[name].used)
        # Which policy answers must not be a guess.
        if not first and lost and all(idle[n].asked == idle[lost[-1]].asked for n in lost):
            robot = self._robots.pop(lost[-1])
            robot.lost()
        else:
            robot = Robot(self._service)
            while idle and len(self._robots) >= self._service.config.max_clients:
                oldest = min(idle, key=lambda name: idle[name].used)
                del self._robots[oldest], idle[oldest]
        self._robots[peer] = robot
        return robot

    async def _ready(self, robot: Robot, request: bytes) -> bytes:
        return b""

    async def _instruct(self, robot: Robot, request: bytes) -> bytes:
        with self._counted():
            robot.instruct(_parsed(_SETUP, request).data)
        return b""

    async def _see(self, robot: Robot, request: AsyncIterator[bytes]) -> bytes:
        with self._counted():
            async with asyncio.timeout(self._service.config.io_timeout):
                data = await self._joined(request)
            await robot.see(data)
        return b""

    async def _actions(self, robot: Robot, request: bytes) -> bytes:
        return _ACTIONS(data=await robot.actions()).SerializeToString()

    async def _joined(self, parts: AsyncIterator[bytes]) -> bytes:
        """An observation that comes in parts."""
        joined = bytearray()
        async for part in parts:
            message = _parsed(_OBSERVATION, part)
            if message.transfer_state not in (_BEGIN, _MIDDLE, _END):
                raise InputError(f"message: unknown transfer state {message.transfer_state}")
            if message.transfer_state == _BEGIN:
                joined.clear()
            joined += message.data
            if len(joined) > self._service.config.max_message:
                raise InputError(
                    f"the observation is larger than {self._service.config.max_message} bytes; "
                    "--max-message-mib allows more"
                )
            if message.transfer_state == _END:
                return bytes(joined)
        raise InputError("message: the observation has no end")

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            self._service.counters.refused += 1
            raise InputError("the observation did not arrive in time") from error
        except InputError:
            self._service.counters.refused += 1
            raise


def _machine(peer: str) -> str:
    """A connection's address without its port."""
    return peer.rpartition(":")[0]


def _parsed(kind: Callable[[], Message], data: bytes) -> Any:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InputError(f"message: not one of LeRobot's ({first_line(error)})") from error
    return message


def _message_kinds() -> tuple[Any, Any, Any]:
    """`Observation`, `PolicySetup` and `Actions` of LeRobot's `services.proto`."""
    file = descriptor_pb2.FileDescriptorProto(
        name="services.proto", package="transport", syntax="proto3"
    )
    field = descriptor_pb2.FieldDescriptorProto
    state, data = ("transfer_state", field.TYPE_INT32), ("data", field.TYPE_BYTES)
    names = {"Observation": (state, data), "PolicySetup": (data,), "Actions": (data,)}
    for name, fields in names.items():
        kind = file.message_type.add(name=name)
        for number, (key, of) in enumerate(fields, 1):
            kind.field.add(name=key, number=number, type=of, label=field.LABEL_OPTIONAL)
    # A pool of our own: lerobot's may be in this process, too.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    first, second, third = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"transport.{name}"))
        for name in names
    )
    return first, second, third


_OBSERVATION, _SETUP, _ACTIONS = _message_kinds()
