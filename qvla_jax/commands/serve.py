"""`qvla serve`: a policy for robots."""

import contextlib
import sys

import jax.numpy as jnp

from qvla_jax.inference import load_policy
from qvla_jax.progress import ProgressBars
from qvla_jax.serving import ServeConfig as Config


def main(config: Config) -> None:
    """Serves a policy until it is told to stop."""
    from qvla_jax.serving import serve  # which needs the extra

    config.read_token()  # whatever is wrong with it shall not take the time of loading
    if config.token_file is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"qvla: warning: everybody who reaches {config.host} can use this policy; --token-file "
            "names the token that clients have to send",
            file=sys.stderr,
        )
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressBars())

        def ready(text: str) -> None:
            stack.close()  # the bars
            print(text, flush=True)

        policy = load_policy(config.policy, dtype=jnp.dtype(config.dtype), **config.said())
        serve(policy, config, progress=progress, ready=ready)
