"""Settings of the server, shared by the Python API and the command line."""

import dataclasses
import re
import ssl
from pathlib import Path
from typing import Literal

from qvla_jax.errors import InputError
from qvla_jax.model_options import ModelOptions

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A token shorter than this can be guessed.
_MIN_TOKEN = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelOptions):
    """Serves policies to robots over the protocols of openpi, OpenVLA and vla-eval, on one port.

    They are compiled for all batch sizes before the port opens. SIGTERM and Ctrl-C stop the server
    after all accepted requests are answered.

    >>> from qvla_jax import ServeConfig
    >>> ServeConfig(policy="runs/mini/policy.qvla", max_message_mib=0.5).max_message
    524288
    """

    # A policy that ships with the package, a directory that holds one, or a .qvla file.
    policy: str = "libero-mini"
    # Further policies, each as NAME=POLICY. A client's address names the one that it asks
    # (?policy=NAME); others ask the first, to which alone the settings of public directories apply.
    also: tuple[str, ...] = ()
    # Memory for the weights of all policies together, in GiB; the server does not start beyond it.
    memory_limit_gib: float | None = None
    # Address to listen on; the default is reachable from this machine only.
    host: str = "127.0.0.1"
    # Port; 0 takes a free one.
    port: int = 8000
    # Port for LeRobot's asynchronous client; 0 takes a free one. By default it is not served.
    lerobot_port: int | None = None
    # File with the token that clients must send; without one, all clients are served.
    token_file: Path | None = None
    # Certificate chain and private key (PEM) for TLS; without them, nothing is encrypted.
    tls_cert: Path | None = None
    tls_key: Path | None = None
    # Gripper entry of the actions: the policy's own (for OpenVLA policies 1 opens, 0 closes), or
    # that of LIBERO's environments (-1 opens, +1 closes).
    gripper: Literal["policy", "libero"] = "policy"
    # Dtype of the weights in memory.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Maximum number of observations in one call of the policy.
    max_batch: int = 8
    # How long a call waits for others to join it, in milliseconds.
    batch_window_ms: float = 2.0
    # Maximum number of concurrent clients; more are turned away.
    max_clients: int = 128
    # Largest message in MiB. Together with max_clients it bounds the memory for messages.
    max_message_mib: float = 8.0
    # Largest side of an image in pixels.
    max_image_side: int = 1024
    # Seconds for a request to arrive completely, for a reply to be sent, and between REST requests.
    io_timeout: float = 30.0
    # Seconds after which a websocket that sends no message is closed.
    idle_timeout: float = 3600.0
    # Seconds for pending answers once the server is stopped.
    shutdown_timeout: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch", "max_clients", "max_image_side"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_message_mib", "io_timeout", "idle_timeout", "shutdown_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        if self.memory_limit_gib is not None and not 0 < self.memory_limit_gib < float("inf"):
            raise InputError(f"memory_limit_gib must be positive, got {self.memory_limit_gib}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("TLS needs both tls_cert and tls_key")
        self.further()
        if not 0 <= self.batch_window_ms <= 1000:
            raise InputError(f"batch_window_ms: expected 0 to 1000, got {self.batch_window_ms}")
        for name in ("port", "lerobot_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65535:
                raise InputError(f"{name}: expected 0 to 65535, got {getattr(self, name)}")
        if self.lerobot_port is not None and (self.token_file or self.tls_cert):
            raise InputError(
                "lerobot_port: LeRobot's client knows neither tokens nor TLS; serve it without, on "
                "the loopback address, and let robots come through a tunnel (ssh -L)"
            )

    @property
    def max_message(self) -> int:
        """Largest message in bytes."""
        return int(self.max_message_mib * 2**20)

    def further(self) -> dict[str, str]:
        """The further policies by their names.

        Raises:
            InputError: one has no name, or a name that another one has.
        """
        found: dict[str, str] = {}
        for entry in self.also:
            name, equals, source = entry.partition("=")
            if not equals or not source or not _NAME.fullmatch(name):
                raise InputError(
                    f"also {entry!r}: expected NAME=POLICY, a name of letters, digits, . _ and -"
                )
            if name in found:
                raise InputError(f"also: two policies have the name {name}")
            found[name] = source
        return found

    def read_tls(self) -> ssl.SSLContext | None:
        """What encrypts the connections.

        Raises:
            InputError: certificate and key cannot be read, do not fit, or the key has a passphrase.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

        def passphrase() -> str:
            raise InputError(f"{self.tls_key}: the key has a passphrase; give one without")

        try:
            context.load_cert_chain(self.tls_cert, self.tls_key, passphrase)
        except OSError as error:
            raise InputError(
                f"{self.tls_cert}, {self.tls_key}: no certificate and its key in PEM ({error})"
            ) from error
        return context

    def read_token(self) -> str | None:
        """The token that clients must send.

        Raises:
            InputError: the file cannot be read, or its token is too easy to guess.
        """
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.token_file}: no token can be read ({error})") from error
        if len(token) < _MIN_TOKEN or not token.isprintable() or " " in token:
            raise InputError(
                f"{self.token_file}: expected at least {_MIN_TOKEN} printable characters without "
                "blanks; `openssl rand -hex 32` makes some"
            )
        return token
