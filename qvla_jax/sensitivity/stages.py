"""Replays only what follows a perturbation.

The network is cut into the stages of its layout (patch embeddings, transformer blocks, projectors),
and further into parts: both towers together, the halves of a block, single layers. Each is wrapped
to either run or return the output of the unperturbed pass, depending on a flag that is an argument
of the compiled function: one program replays from any layer, and the prefix costs a copy. Parts are
nested; the inside of a part that does not run costs nothing.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from flax import nnx

from qvla_jax.array_typing import Array
from qvla_jax.families.layout import Layout
from qvla_jax.models.surgery import get_module, named_modules, replace_modules


class Stage(nnx.Module):
    """A module whose calls go through a function of (path, module, arguments)."""

    def __init__(self, inner: nnx.Module, path: str, call: Callable[..., Array]):
        self.inner = inner
        self.path = path
        self.call = call

    def __call__(self, *args: Any) -> Array:
        """The function's result for the call."""
        return self.call(self.path, self.inner, *args)


def stage_paths(model: nnx.Module, layout: Layout) -> tuple[str, ...]:
    """Paths of all stages, in no particular order."""
    return _matching(model, layout.stages)


def part_paths(model: nnx.Module, layout: Layout, layers: Sequence[str]) -> tuple[str, ...]:
    """Paths of all reusable parts, including stages and these layers, in no particular order."""
    return tuple(dict.fromkeys((*_matching(model, (*layout.stages, *layout.parts)), *layers)))


def _matching(model: nnx.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        path
        for path in named_modules(model, nnx.Module)
        if any(re.fullmatch(pattern, path) for pattern in patterns)
    )


def wrap_stages(model: nnx.Module, paths: Sequence[str], call: Callable[..., Array]) -> None:
    """Puts a `Stage` around each of these modules, in place, those inside others first."""
    inner_first = sorted(paths, key=lambda path: -path.count("."))
    replace_modules(model, {p: Stage(get_module(model, p), p, call) for p in inner_first})


def run_or_reuse(run: Array, inner: nnx.Module, args: tuple[Any, ...], output: Array) -> Array:
    """The module's output where `run` is true, else `output`."""
    return jax.lax.cond(
        run,
        lambda: inner(*args),  # type: ignore[operator]
        lambda: output,
    )


def downstream(order: Sequence[str], layers: Collection[str], layout: Layout) -> frozenset[str]:
    """The parts that must run when the outputs of these layers are perturbed.

    A perturbed layer itself runs only if another one's perturbation reaches it, or its own, from an
    earlier call.

    Args:
        order: paths of all parts in the order in which the forward pass enters them, once for each
            call.
        layers: the perturbed layers.
        layout: of the network.
    """
    last = {path: number for number, path in enumerate(order)}
    first = {path: number for number, path in reversed(list(enumerate(order)))}

    def follows(part: str, layer: str) -> bool:
        if last[part] <= first[layer] or layout.is_independent(part, layer):
            return False
        # A later call of the part may still depend on the layer.
        return first[part] != last[part] or not layout.take_same_input(part, layer)

    return frozenset(
        part
        for part in last
        if any(layer.startswith(f"{part}.") or follows(part, layer) for layer in layers)
    )
