"""Settings of the server, shared by the Python API and the command line."""

import dataclasses
from pathlib import Path
from typing import Literal

from qvla_jax.errors import InputError
from qvla_jax.model_options import ModelOptions

# A token shorter than this can be guessed.
_MIN_TOKEN = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelOptions):
    """Serves a policy to robots: the openpi websocket protocol and OpenVLA's REST API, on one port.

    It is compiled for all batch sizes before the port opens. SIGTERM and Ctrl-C stop the server
    after all accepted requests are answered.

    >>> from qvla_jax import ServeConfig
    >>> ServeConfig(policy="runs/mini/policy.qvla", max_message_mib=0.5).max_message
    524288
    """

    # A policy that ships with the package, a directory that holds one, or a .qvla file.
    policy: str = "libero-mini"
    # Address to listen on; the default is reachable from this machine only.
    host: str = "127.0.0.1"
    # Port; 0 takes a free one.
    port: int = 8000
    # File with the token that clients must send; without one, all clients are served.
    token_file: Path | None = None
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
        if not 0 <= self.batch_window_ms <= 1000:
            raise InputError(f"batch_window_ms: expected 0 to 1000, got {self.batch_window_ms}")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port: expected 0 to 65535, got {self.port}")

    @property
    def max_message(self) -> int:
        """Largest message in bytes."""
        return int(self.max_message_mib * 2**20)

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
