"""One forward and s reverse passes for all layers at once.

The forward pass records the input X of every quantized layer and adds a zero perturbation to its
output; the derivative of v . A with respect to these perturbations is the cotangent g = J^T v of
each layer's output. A method's function of X and g is a `Contraction`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.compiler import check_sums
from qvla_jax.sensitivity.instrument import (
    check_frames,
    no_perturbations,
    perturbed_call,
    side_by_side,
)
from qvla_jax.sensitivity.probes import Probes, probe_vectors
from qvla_jax.sharding import DATA_AXIS

# For one layer: cotangents g [b, T, c] -> [b, ...], summed over the probes.
FromCotangent: TypeAlias = Callable[[Float[Array, "b T c"]], Float[Array, "b ..."]]


class Contraction(Protocol):
    """A method's part: prepares a layer's inputs once, then processes each probe's cotangent."""

    def __call__(self, x: Float[Array, "b T k"], constants: Any) -> FromCotangent:
        """`constants` are the method's arrays for this layer."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probed:
    """A batch of frames, and what is pulled back from its actions."""

    # Model inputs, [b, ...].
    inputs: Any
    # Number of each frame in the calibration set.
    frames: Int[Array, " b"]
    # PRNG key of the sweep.
    key: Array
    # Weight of each action dimension; None weighs all equally.
    weights: Float[Array, " a"] | None = None


@dataclasses.dataclass(frozen=True)
class ReverseSpec:
    """Everything but arrays that a compiled reverse sweep depends on."""

    graphdef: nnx.GraphDef[Any]
    paths: tuple[str, ...]
    contraction: Contraction
    probes: Probes
    mesh: Mesh
    # Probes pulled back together; more of them take more memory.
    block: int = 8
    # Actions of a chunk that count, from the first; None: all.
    steps: int | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` where the compiler's sums are wrong."""
        check_sums()

    def vectors(self, probed: Probed, action: Float[Array, "b h a"]) -> Float[Array, "s b h a"]:
        """What is pulled back from the actions of a batch."""
        vectors = probe_vectors(
            self.probes, probed.key, probed.frames, action.shape[1:], probed.weights, self.steps
        )
        return vectors.astype(action.dtype)


@functools.partial(jax.jit, static_argnums=0)
def reverse_sweep(
    spec: ReverseSpec, state: Any, constants: Mapping[str, Any], probed: Probed
) -> dict[str, Float[Array, "b ..."]]:
    """The contraction of every layer that the model reaches, for every frame.

    Frames are independent, so devices along `data` work on their shares of the batch without
    communication. Along `channel` the compiler partitions the program like `state` and `constants`:
    constants split over output channels split the contraction, and split weights take only their
    share of memory.

    Args:
        spec: static description.
        state: the model's arrays.
        constants: path -> the contraction's arrays for this layer.
        probed: frames and probes.

    Returns:
        Path -> contraction, summed over the probes. Layers that the forward pass never reaches
        are absent.
    """
    everywhere, split = PartitionSpec(), PartitionSpec(DATA_AXIS)
    probes: Any = Probed(split, split, everywhere, everywhere)  # type: ignore[arg-type]
    return jax.shard_map(
        functools.partial(_sweep, spec),
        mesh=spec.mesh,
        in_specs=(everywhere, everywhere, probes),
        out_specs=split,
        axis_names={DATA_AXIS},
        check_vma=False,
    )(state, constants, probed)


def _sweep(
    spec: ReverseSpec, state: Any, constants: Mapping[str, Any], probed: Probed
) -> dict[str, Float[Array, "b ..."]]:
    count, args = probed.frames.shape[0], (probed.inputs,)
    zeros = no_perturbations(spec.graphdef, state, args, spec.paths)
    forward = functools.partial(perturbed_call, spec.graphdef, state, args)
    action, pull_back, seen = jax.vjp(forward, zeros, has_aux=True)
    for path, calls in seen.items():
        check_frames(path, calls, count)
    contract = {
        path: spec.contraction(side_by_side(calls, count), constants.get(path))
        for path, calls in seen.items()
    }

    def of_probe(vector: Float[Array, "b h a"]) -> dict[str, Array]:
        (cotangents,) = pull_back(vector)
        return {path: contract[path](side_by_side(g, count)) for path, g in cotangents.items()}

    vectors = spec.vectors(probed, action)
    return sum_in_blocks(of_probe, vectors, spec.block)


def sum_in_blocks(function: Callable[[Any], Any], vectors: Any, block: int) -> Any:
    """Sum of `function` over the first axis of all arrays, `block` entries at a time."""
    length = len(jax.tree.leaves(vectors)[0])
    block = max(d for d in range(1, min(block, length) + 1) if length % d == 0)

    def of_block(part: Any) -> Any:
        return jax.tree.map(lambda r: r.sum(axis=0), jax.vmap(function)(part))

    parts = jax.tree.map(lambda v: v.reshape(-1, block, *v.shape[1:]), vectors)
    first = jax.tree.map(lambda v: v[0], parts)
    if block == length:
        return of_block(first)
    # One body for all blocks: a program with two of them takes twice as long to compile.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_block, first))
    total, _ = jax.lax.scan(
        lambda acc, part: (jax.tree.map(jnp.add, acc, of_block(part)), None), zeros, parts
    )
    return total
