"""The port: opened after the policy is compiled, closed after all requests are answered."""

import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from aiohttp import web

from qvla_jax.errors import InputError, QvlaError
from qvla_jax.inference import Policy
from qvla_jax.progress import Progress, no_progress
from qvla_jax.serving.application import make_application
from qvla_jax.serving.config import ServeConfig
from qvla_jax.serving.service import Service
from qvla_jax.serving.websocket import Websockets

if TYPE_CHECKING:
    from qvla_jax.serving.grpc_port import LerobotPort

# Connections beyond the maximum of clients, for refusals and health checks.
_SPARE: Final = 16


class _Refusal(asyncio.Protocol):
    """Closes a connection immediately."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class PolicyServer:
    """Serves policies while used as an asynchronous context manager.

    async with PolicyServer(policy, ServeConfig(port=0)) as server:
        print(server.port)

    Raises (on entering):
        InputError: the server cannot listen on the address.
        PolicyError: a policy returns NaN or infinite actions.
    """

    def __init__(
        self,
        policy: Policy,
        config: ServeConfig,
        *,
        others: Mapping[str, Policy] | None = None,
        key_needed: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        """Reads the token and the certificate; nothing runs yet.

        Args:
            policy: what answers.
            config: the settings; those that name, load and choose policies are ignored.
            others: further policies by their names.
            key_needed: requests must have `unnorm_key`; otherwise the policy's own is the default.
            progress: of compiling.
        """
        self._config = config
        self._progress = progress
        self._tls = config.read_tls()
        self._service = Service(
            policy,
            config,
            others=others or {},
            token=config.read_token(),
            key_needed=key_needed,
        )
        self._websockets = Websockets(self._service)
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._lerobot = _lerobot_port(self._service)

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        assert self._listener is not None
        return self._listener.sockets[0].getsockname()[1]

    @property
    def lerobot_port(self) -> int | None:
        """The port for LeRobot's asynchronous client; None if it is not served."""
        return None if self._lerobot is None else self._lerobot.port

    @property
    def service(self) -> Service:
        """What answers."""
        return self._service

    async def __aenter__(self) -> Self:
        """Compiles the policies for every batch size, then opens the port."""
        config = self._config
        loop = asyncio.get_running_loop()
        for served in self._service.policies:
            warm_up = functools.partial(served.batcher.warm_up, progress=self._progress)
            await loop.run_in_executor(None, warm_up)
        for served in self._service.policies:
            served.batcher.start()
        self._runner = web.AppRunner(
            make_application(self._service, self._websockets),
            access_log=None,
            # Closes connections without a complete request header, and idle ones.
            keepalive_timeout=config.io_timeout,
            # A request whose client has gone needs no answer.
            handler_cancellation=True,
            # Limits what is read after a refusal; compressed bodies are not accepted at all.
            lingering_time=1.0,
            auto_decompress=False,
            # By then all requests are answered or have timed out.
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        try:
            self._listener = await loop.create_server(
                self._connect,
                config.host,
                config.port,
                backlog=config.max_clients,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else config.io_timeout,
            )
            if self._lerobot is not None:
                await self._lerobot.open(config.host, config.lerobot_port or 0)
        except InputError:
            await self._stop()
            raise
        except (OSError, OverflowError, UnicodeError) as error:
            await self._stop()
            raise InputError(
                f"cannot listen on {config.host} port {config.port} ({error}); choose another "
                "--port or --host"
            ) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the port, answers pending requests, then closes the connections."""
        assert self._listener is not None
        self._listener.close()
        # Before aiohttp stops reading, which would cut off pending requests.
        self._service.closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.shutdown_timeout):
                await self._websockets.close()
                if self._lerobot is not None:
                    self._lerobot.wake()
                while self._service.counters.clients:
                    await asyncio.sleep(0.01)
        await self._stop()

    async def _stop(self) -> None:
        if self._lerobot is not None:
            await self._lerobot.close()
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            server = self._runner.server
            transports = [handler.transport for handler in server.connections] if server else []
            await self._runner.cleanup()
            if self._tls is not None:
                # An idle client does not read, and so does not confirm that TLS ends.
                for transport in transports:
                    if transport is not None:
                        transport.abort()
        await self._service.stop()

    def _connect(self) -> asyncio.BaseProtocol:
        assert self._runner is not None
        server = self._runner.server
        limit = self._config.max_clients + _SPARE
        if server is None or len(server.connections) >= limit:
            self._service.counters.turned_away += 1
            return _Refusal()
        return server()


def _lerobot_port(service: Service) -> "LerobotPort | None":
    """The port of LeRobot's clients, if it is asked for.

    Raises:
        QvlaError: a package for it is missing.
    """
    if service.config.lerobot_port is None:
        return None
    try:
        from qvla_jax.serving.grpc_port import LerobotPort
    except ModuleNotFoundError as error:
        raise QvlaError(
            f"lerobot_port needs {error.name}, which is not there; pip install 'qvla-jax[grpc]'"
        ) from error
    return LerobotPort(service)


def serve(
    policy: Policy,
    config: ServeConfig,
    *,
    others: Mapping[str, Policy] | None = None,
    key_needed: bool = False,
    progress: Progress = no_progress,
    ready: Callable[[str], None] = print,
) -> None:
    """Serves until SIGTERM or SIGINT.

    >>> import qvla_jax
    >>> def ready(line):
    ...     print(line.partition(" at ")[0])
    ...     signal.raise_signal(signal.SIGTERM)  # here already, to come to an end
    >>> policy = qvla_jax.random_policy("tiny-test")
    >>> qvla_jax.serve(policy, qvla_jax.ServeConfig(port=0, max_batch=1), ready=ready)
    Serving tiny-test

    Args:
        policy: what answers.
        config: the settings; those that name, load and choose policies are ignored.
        others: further policies by their names.
        key_needed: requests must have `unnorm_key`; otherwise the policy's own is the default.
        progress: of compiling.
        ready: called once the server listens, with one line that says where.

    Raises:
        InputError: the server cannot listen on the address, a file of the settings cannot be read,
            or the policies do not go together.
        PolicyError: the policy returns NaN or infinite actions.
    """

    async def run() -> None:
        stop = asyncio.Event()
        async with PolicyServer(
            policy, config, others=others, key_needed=key_needed, progress=progress
        ) as server:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            host = f"[{config.host}]" if ":" in config.host else config.host
            names = " and ".join(served.name for served in server.service.policies)
            secure, address = "s" if config.tls_cert else "", f"{host}:{server.port}"
            doors = [
                f"ws{secure}://{address} (openpi)",
                f"http{secure}://{address}/act (OpenVLA)",
                f"ws{secure}://{address}/vla-eval (vla-eval)",
            ]
            if server.lerobot_port is not None:
                doors.append(f"{host}:{server.lerobot_port} (LeRobot)")
            ready(f"Serving {names} at {', '.join(doors[:-1])} and {doors[-1]}")
            await stop.wait()

    asyncio.run(run())
