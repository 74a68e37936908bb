"""Activation bits of layers: their sensitivity, and the allocation under a budget of work.

Weight bits cost bytes, activation bits cost work: a budget of A is the average of the activation
bits over all multiplications of a forward pass. To first order errors add, so the two choices can
be made one after the other, each under its own budget. Layers with the same input round it once and
share one choice.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.unpacking import RoundingLinear, unpacked
from qvla_jax.kernels.activations import ACTIVATION_BITS, largest_code
from qvla_jax.models.surgery import named_modules
from qvla_jax.progress import Progress, no_progress
from qvla_jax.sensitivity.batches import Calibration, FirstFrames
from qvla_jax.sensitivity.instrument import hooked_call
from qvla_jax.solvers import AllocationProblem, solve

_FRAMES: Final = 32
_BATCH: Final = 8
# An exact solver is cheap here: there is one choice per layer input, not per channel.
_SOLVER: Final = "ilp"


def allocate_activations(
    policy: Policy,
    packed: Policy,
    calibration: Calibration,
    budget_bits: float,
    *,
    progress: Progress = no_progress,
) -> dict[str, int]:
    """Activation bits of every packed layer by measured sensitivity.

    The cost of a choice is the squared error of the normalized action, summed over the chunk, when
    only the inputs of these layers are rounded. Both actions that are compared come from the packed
    policy, so the rounding of its weights does not count.

    Args:
        policy: full precision.
        packed: made from it; its activation bits are ignored.
        calibration: its first 32 frames are used.
        budget_bits: average over multiplications, 4 to 16.
        progress: called with the measurements done.

    Returns:
        4, 8 or 16 by path.

    Raises:
        BudgetError: the budget is below 4 bits.
    """
    groups = _same_input(packed_layers(packed.model), policy.layout.same_input)
    batches = _inputs(policy, calibration)
    work = _multiplications(policy, packed, batches[0])
    costs = _costs(policy, packed, groups, batches, progress)
    sizes = np.asarray([sum(work[path] for path in group) for group in groups])
    problem = AllocationProblem(
        costs=costs,
        sizes=sizes[:, None] * np.asarray(ACTIVATION_BITS)[None],
        budget=int(budget_bits * sizes.sum()),
    )
    choice = solve(problem, _SOLVER).choice
    return {
        path: ACTIVATION_BITS[option]
        for group, option in zip(groups, choice, strict=True)
        for path in group
    }


def _same_input(
    paths: Iterable[str], same_input: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Paths in order, grouped by the input that their layers take."""
    groups: dict[tuple[str, str], tuple[str, ...]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        first = next((names[0] for names in same_input if name in names), name)
        groups[parent, first] = (*groups.get((parent, first), ()), path)
    return list(groups.values())


def _inputs(policy: Policy, calibration: Calibration) -> list[Any]:
    frames = FirstFrames(calibration, min(calibration.frames, _FRAMES))
    return [
        policy.complete(jax.tree.map(jnp.asarray, policy.prepare(observations)))
        for observations in frames.batches(_BATCH)
    ]


def _multiplications(policy: Policy, packed: Policy, inputs: Any) -> dict[str, int]:
    """Multiplications of each packed layer in one forward pass of a batch; 0 if never reached."""
    shapes = {path: layer.weight.shape for path, layer in packed_layers(packed.model).items()}
    found = dict.fromkeys(shapes, 0)

    def count(path: str, x: Array, y: Array) -> Array:
        found[path] += x.size * shapes[path][0]
        return y

    graphdef, state = nnx.split(policy.model)
    jax.eval_shape(
        lambda state, inputs: hooked_call(graphdef, state, (inputs,), tuple(shapes), count),
        state, inputs,
    )  # fmt: skip
    return found


def _costs(
    policy: Policy,
    packed: Policy,
    groups: Sequence[tuple[str, ...]],
    batches: Sequence[Any],
    progress: Progress,
) -> Float[np.ndarray, "g n"]:
    """Squared error of the action for every group and option, averaged over frames."""
    graphdef, state = nnx.split(unpacked(policy, packed, rounding=True).model)
    exact = {path: np.float32(largest_code(16)) for group in groups for path in group}
    reference = [_act(graphdef, state, exact, inputs) for inputs in batches]
    rounded = [bits for bits in ACTIVATION_BITS if bits != 16]
    costs = np.zeros((len(groups), len(ACTIVATION_BITS)))
    frames = sum(len(actions) for actions in reference)
    for done, (row, bits) in enumerate(itertools.product(range(len(groups)), rounded)):
        progress("activations", done, len(groups) * len(rounded))
        codes = exact | dict.fromkeys(groups[row], np.float32(largest_code(bits)))
        error = 0.0
        for inputs, actions in zip(batches, reference, strict=True):
            found = _act(graphdef, state, codes, inputs)
            change = policy.layout.executed(found.astype(np.float64) - actions)
            error += float(np.square(change).sum())
        costs[row, ACTIVATION_BITS.index(bits)] = error / frames
    progress("activations", len(groups) * len(rounded), len(groups) * len(rounded))
    return costs


def _act(
    graphdef: nnx.GraphDef[Any], state: Any, codes: Mapping[str, np.float32], inputs: Any
) -> Float[np.ndarray, "b h a"]:
    return np.asarray(_forward(graphdef, state, codes, inputs))


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graphdef: nnx.GraphDef[Any], state: Any, codes: Mapping[str, Array], inputs: Any
) -> Float[Array, "b h a"]:
    model: Any = nnx.merge(graphdef, state)
    for path, layer in named_modules(model, RoundingLinear).items():
        layer.largest_code = nnx.Param(codes[path])
    with jax.default_matmul_precision("float32"):
        return model(inputs).astype(jnp.float32)
