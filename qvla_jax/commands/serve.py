"""`qvla serve`: policies for robots."""

import contextlib
import sys

import jax.numpy as jnp

from qvla_jax.families.registry import public_family
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.places import policy_folder
from qvla_jax.progress import ProgressBars
from qvla_jax.serving import ServeConfig as Config


def main(config: Config) -> None:
    """Serves policies until it is stopped."""
    from qvla_jax.serving import serve  # needs the extra
    from qvla_jax.serving.policies import check_memory

    config.read_token()  # fail before the policy is loaded
    config.read_tls()
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

        policy_folder(config.policy, config, progress=progress)  # fetched, if it is elsewhere
        said, keys = config.said(), undecided_statistics(config)
        if keys:
            said["unnorm_key"] = keys[0]  # used only by requests that name it
            print(
                f"qvla: note: requests have to name their statistics, as unnorm_key; there are: "
                f"{', '.join(keys)}; --unnorm-key chooses for those that do not",
                file=sys.stderr,
            )
        dtype = jnp.dtype(config.dtype)
        policy = load_policy(config.policy, dtype=dtype, **said)
        others: dict[str, Policy] = {}
        # After each one, so that not much more than the limit is ever loaded.
        check_memory({policy.config.name: policy}, config.memory_limit_gib)
        for name, source in config.further().items():
            others[name] = load_policy(source, dtype=dtype)
            check_memory({policy.config.name: policy, **others}, config.memory_limit_gib)
        serve(policy, config, others=others, key_needed=bool(keys), progress=progress, ready=ready)


def undecided_statistics(config: Config) -> list[str]:
    """The data sets of a public directory, if neither it nor the options choose one of several.

    Args:
        config: the server's settings.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    folder = policy_folder(config.policy, config)
    family = public_family(folder)
    return [] if family is None else family.undecided_statistics(folder, config)
