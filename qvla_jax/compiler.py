"""Keeps JAX 0.10 from computing wrong sums on CPUs.

There XLA hands sums, and the element-wise operations around them, to YNNPACK. Where some operands
lack an axis that the others have, the results can be wrong: the pull-back of a normalization,
batched over probes, is wrong from the second probe on (four probes, two frames of 512 tokens with
64 features; with 256 tokens it is right). JAX 0.11 and 0.12 compute it correctly. Without these
fusions a sweep of `libero-mini` takes 5 % more CPU time.

Nothing here imports JAX before it is called.
"""

import functools
import importlib.metadata
import math
import os
from collections.abc import MutableMapping
from typing import Any, Final

from qvla_jax.errors import InputError

_VARIABLE: Final = "XLA_FLAGS"
_FLAG: Final = "--xla_cpu_experimental_ynn_fusion_type"
# No kind of fusion.
SETTING: Final = f"{_FLAG}="
# Normalized vectors that the fused pull-back gets wrong: probes, frames, tokens, features.
_SHAPE: Final = (4, 2, 512, 64)
_TOLERANCE: Final = 1e-3


def avoid_wrong_sums(environment: MutableMapping[str, str] = os.environ) -> None:
    """Turns these fusions off in XLA_FLAGS, unless the flag has a value there.

    XLA reads the variable when JAX makes its first device.
    """
    flags = environment.get(_VARIABLE, "")
    if _affected() and _FLAG not in flags:
        environment[_VARIABLE] = f"{flags} {SETTING}".strip()


@functools.cache
def check_sums() -> None:
    """Checks sums on the CPU, if the installed JAX is one that may compute wrong ones.

    Raises:
        InputError: they are wrong; the message says how to turn the fusions off.
    """
    if not _affected():
        return
    import jax

    if jax.default_backend() == "cpu" and error_of_sums() > _TOLERANCE:
        raise InputError(
            "this JAX computes wrong sums on CPUs: import qvla_jax before JAX makes its first "
            f"device, or set {_VARIABLE}={SETTING}, or install jax>=0.11 (Python 3.12 or later)"
        )


def error_of_sums() -> float:
    """Largest error of a normalization's pull-back batched over probes; relative."""
    import jax
    import jax.numpy as jnp

    def normalized(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    @jax.jit
    def batched(probes: Any, x: Any) -> Any:
        _, pull_back = jax.vjp(normalized, x)
        return jax.vmap(pull_back)(probes)[0]

    @jax.jit
    def single(probe: Any, x: Any) -> Any:
        return jax.vjp(normalized, x)[1](probe)[0]

    probes = jnp.sin(jnp.arange(math.prod(_SHAPE), dtype=jnp.float32)).reshape(_SHAPE)
    x = jnp.cos(jnp.arange(math.prod(_SHAPE[1:]), dtype=jnp.float32)).reshape(_SHAPE[1:])
    expected = jnp.stack([single(probe, x) for probe in probes])
    error = jnp.max(jnp.abs(batched(probes, x) - expected))
    return float(error / jnp.max(jnp.abs(expected)))


@functools.cache
def _affected() -> bool:
    """Whether the installed JAX is one that computes wrong sums."""
    try:
        major, minor = importlib.metadata.version("jax").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (0, 11)
