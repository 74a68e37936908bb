"""Probe vectors v with E[v v^T] = I over the entries of an action chunk."""

from typing import Final, Literal, TypeAlias

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.errors import InputError

# A number of Rademacher vectors, or every basis vector once.
Probes: TypeAlias = int | Literal["full"]
DEFAULT_PROBES: Final = 8


def check_probes(probes: Probes) -> None:
    """Raises an `InputError` unless `probes` is "full" or a positive number."""
    if probes != "full" and (isinstance(probes, bool | str) or probes < 1):
        raise InputError(f'probes: expected "full" or a positive number, got {probes!r}')


def probe_vectors(
    probes: Probes,
    key: Array,
    frames: Int[Array, " b"],
    shape: tuple[int, ...],
    weights: Float[Array, " a"] | None,
    steps: int | None = None,
) -> Float[Array, "s b h a"]:
    """Probes for each frame, whose squared products with dA average to the weighted ||dA||^2.

    With v = sqrt(s) * (probe), sum over s of (v_s . dA)^2 is an unbiased estimate of
    sum_ij weights_j dA_ij^2 for Rademacher vectors, and exactly that for the basis ("full"), where
    i runs over the first `steps` actions.

    Args:
        probes: s, or "full" for the basis vectors of all h a entries, or of those of the steps.
        key: typed PRNG key of the whole sweep.
        frames: number of each frame; the vectors of a frame depend only on it and the key.
        shape: (h, a).
        weights: weight of each action dimension; None weighs all equally.
        steps: actions of a chunk that count, from the first; None: all.
    """
    root = jnp.ones((shape[1],), jnp.float32) if weights is None else jnp.sqrt(weights)
    scale = root[None, None, None, :]
    if probes == "full":
        entries = shape[1] * (shape[0] if steps is None else steps)
        basis = jnp.eye(entries, shape[0] * shape[1], dtype=scale.dtype).reshape(-1, 1, *shape)
        return jnp.broadcast_to(basis * scale, (basis.shape[0], frames.shape[0], *shape))

    def of_frame(frame: Int[Array, ""]) -> Float[Array, "s h a"]:
        return jax.random.rademacher(
            jax.random.fold_in(key, frame), (probes, *shape), dtype=scale.dtype
        )

    vectors = jax.vmap(of_frame, out_axes=1)(frames)
    if steps is not None:
        counted = (jnp.arange(shape[0]) < steps).astype(scale.dtype)
        vectors = vectors * counted[None, None, :, None]
    return vectors * scale / jnp.sqrt(jnp.asarray(probes, scale.dtype))
