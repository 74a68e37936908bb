"""Serves policies to robots: the protocols of openpi, OpenVLA and vla-eval, on one port.

    qvla serve --policy FILE.qvla

A message is decoded (`msgpack_numpy`, `json_numpy`, `pictures`), checked and prepared
(`observations`), joins a batch (`batching`) and is answered (`openpi`, `vla_eval`, `rest`);
`server` opens and closes the port. LeRobot's clients have a port of their own (`grpc_port`,
`lerobot`, `lerobot_messages`).
Packages of the extras `serve` and `grpc` are imported on first use.
"""

from typing import TYPE_CHECKING, Any

from qvla_jax.serving.config import ServeConfig

if TYPE_CHECKING:
    from qvla_jax.serving.server import PolicyServer as PolicyServer
    from qvla_jax.serving.server import serve as serve

__all__ = ["PolicyServer", "ServeConfig", "serve"]


def __getattr__(name: str) -> Any:
    """Imports modules that need the extra on first use."""
    if name not in ("PolicyServer", "serve"):
        raise AttributeError(f"module 'qvla_jax.serving' has no attribute {name!r}")
    try:
        from qvla_jax.serving import server
    except ModuleNotFoundError as error:
        from qvla_jax.errors import QvlaError

        raise QvlaError(
            f"serving needs {error.name}, which is not there; pip install 'qvla-jax[serve]'"
        ) from error
    value = getattr(server, name)
    globals()[name] = value
    return value
