"""First-order sensitivities of the rows of token embeddings.

Rounding the row of token u changes the embedding's output by dE_u wherever a prompt holds u, so to
first order the action changes by dA = sum_t [u_t = u] J_t dE_u, coherently over all of the token's
occurrences in a frame, J being the derivative of the action with respect to the embedding's output:

    S[u, n] = E_x || M dA ||^2 = E_x E_v ( sum_t [u_t = u] g_t . dE_u,n )^2,     g = J^T v,

with the reverse sweep and the probes of sensitivity.jacobian. Rows that no frame of the set looks
up have no measured cost: other prompts may use them.
"""

import dataclasses
import functools
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax import kernels, sharding
from qvla_jax.array_typing import Array, Float, Int
from qvla_jax.inference.policy import Policy
from qvla_jax.models.linear import Embed
from qvla_jax.models.surgery import named_modules
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.codes import PRUNED, SOURCE
from qvla_jax.sensitivity.accumulate import mean_over_frames
from qvla_jax.sensitivity.batches import Calibration, batch_size, frame_batches
from qvla_jax.sensitivity.instrument import hooked_call, side_by_side
from qvla_jax.sensitivity.methods import counted_weights
from qvla_jax.sensitivity.probes import DEFAULT_PROBES, Probes, check_probes
from qvla_jax.sensitivity.reverse import FromCotangent, Probed, ReverseSpec, reverse_sweep


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowCosts:
    """Costs of the rows of one token embedding that a calibration set uses.

    Attributes:
        path: of the embedding.
        shape: (rows, width) of its table.
        bits: options.
        tokens: rows that a frame looks up, ascending; all others have no measured cost. Padding is
            among them, at no cost where nothing attends to it.
        frames: frames that look up each of them.
        costs: mean over all frames of the squared error of the executed actions, summed, when this
            row alone is rounded.
    """

    path: str
    shape: tuple[int, int]
    bits: tuple[int, ...]
    tokens: Int[np.ndarray, " u"]
    frames: Int[np.ndarray, " u"]
    costs: Float[np.ndarray, "u n"]


@in_32_bits
def embedding_costs(
    policy: Policy,
    calibration: Calibration,
    *,
    bits: tuple[int, ...] = (8,),
    probes: Probes = DEFAULT_PROBES,
    seed: int = 0,
    batch: int = 4,
    progress: Progress = no_progress,
) -> list[RowCosts]:
    """What each token's row costs under each option, to first order.

    Args:
        policy: the full-precision policy.
        calibration: frames to average over; their prompts say which rows are measured.
        bits: options of a whole row, which is rounded to nearest as `kernels.pack_table` does: 2,
            3, 4 or 8; 0 takes the row away, 16 keeps it.
        probes: Rademacher vectors for each frame, or "full" for all basis vectors.
        seed: of the probes.
        batch: frames at a time on each device.
        progress: called with the frames done.

    Returns:
        One entry for each token embedding, none where the policy has none.

    Raises:
        InputError: `probes` or an option is unusable, the set is empty, or a cost is not finite.
    """
    check_probes(probes)
    mesh = sharding.sweep_mesh()
    graphdef, state = nnx.split(policy.model)
    state = sharding.replicate(mesh, state)
    batches = functools.partial(
        frame_batches, policy, calibration, batch_size(calibration.frames, batch, mesh), mesh
    )
    weights = counted_weights(policy)
    found = []
    for path, embed in named_modules(policy.model, Embed).items():
        looked_up = [
            np.unique(frame)
            for item in batches()
            for frame in sharding.to_host(_tokens((graphdef, path), state, item.inputs))[
                : item.count
            ]
        ]
        tokens, frames = np.unique(np.concatenate(looked_up), return_counts=True)
        rows = np.asarray(embed.embedding[...][tokens], np.float32)
        constants = _Rows(
            tokens=jnp.asarray(tokens), changes=jnp.stack([_change(rows, b) for b in bits])
        )
        spec = ReverseSpec(
            graphdef, (path,), _row_change, probes, mesh, steps=policy.layout.executed_steps
        )

        def costs(spec: ReverseSpec = spec, constants: _Rows = constants) -> Any:
            done, (path,) = 0, spec.paths
            for item in batches():
                probed = Probed(
                    item.inputs,
                    item.frames,
                    jax.random.key(seed),
                    None if weights is None else jnp.asarray(weights),
                )
                squares = reverse_sweep(spec, state, {path: constants}, probed)[path]
                done += item.count
                progress("token embeddings", done, calibration.frames)
                yield np.swapaxes(sharding.to_host(squares)[: item.count], 1, 2)

        mean, _ = mean_over_frames(costs())
        v, c = embed.embedding.shape
        found.append(
            RowCosts(path=path, shape=(v, c), bits=bits, tokens=tokens, frames=frames, costs=mean)
        )
    return found


class _Rows(TypedDict):
    """The measured rows, and their change under every option."""

    tokens: Int[Array, " u"]
    changes: Float[Array, "n u c"]


def _row_change(x: Int[Array, "b T 1"], constants: _Rows) -> FromCotangent:
    """The contraction: squared first-order change of v . A for each row, [b, n, u]."""
    same = x == constants["tokens"][None, None]

    def of_cotangent(g: Float[Array, "b T c"]) -> Float[Array, "b n u"]:
        precise = jax.lax.Precision.HIGHEST
        of_token = jnp.einsum("btu,btc->buc", same.astype(g.dtype), g, precision=precise)
        changes = constants["changes"].astype(g.dtype)
        return jnp.square(jnp.einsum("buc,nuc->bnu", of_token, changes, precision=precise))

    return of_cotangent


def _change(rows: Float[np.ndarray, "u c"], bits: int) -> Float[Array, "u c"]:
    """What an option changes of each row."""
    if bits in (PRUNED, SOURCE):
        return jnp.asarray(rows * (-1.0 if bits == PRUNED else 0.0))
    return kernels.dequantize(kernels.pack_table(rows, bits)) - jnp.asarray(rows)


@functools.partial(jax.jit, static_argnums=0)
def _tokens(spec: tuple[nnx.GraphDef[Any], str], state: Any, inputs: Any) -> Int[Array, "b T"]:
    """Token ids that each frame looks up in an embedding; the compiler leaves out the rest."""
    graphdef, path = spec
    seen: list[Array] = []

    def keep(path: str, x: Array, y: Array) -> Array:
        seen.append(x)
        return y

    actions = hooked_call(graphdef, state, (inputs,), (path,), keep)
    return side_by_side(tuple(seen), len(actions))[..., 0]
