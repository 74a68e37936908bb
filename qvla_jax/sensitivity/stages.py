"""Replays only what follows a perturbation.

The network is cut into the stages of its layout (patch embeddings, transformer blocks, projectors),
and further into parts: both towers together, the halves of a block, single layers. Each is wrapped
to either run or return the output of the unperturbed pass, depending on a flag that is an argument
of the compiled function: one program replays from any layer, and the prefix costs a copy. Parts are
nested; the inside of a part that does not run costs nothing. A part that is called several times
has a flag for each call: a change in an action expert runs no layer for the prefix again.
"""

import bisect
import collections
import dataclasses
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

    def __init__(self, inner: nnx.Module, path: str, call: Callable[..., Any]):
        self.inner = inner
        self.path = path
        self.call = call

    def __call__(self, *args: Any) -> Any:
        """The function's result for the call."""
        return self.call(self.path, self.inner, *args)

    def __getattr__(self, name: str) -> Any:
        """What a network uses of a module besides calling it, such as its norms."""
        if name == "inner":  # before it is set
            raise AttributeError(name)
        return getattr(self.inner, name)


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


def wrap_stages(model: nnx.Module, paths: Sequence[str], call: Callable[..., Any]) -> None:
    """Puts a `Stage` around each of these modules, in place, those inside others first."""
    inner_first = sorted(paths, key=lambda path: -path.count("."))
    replace_modules(model, {p: Stage(get_module(model, p), p, call) for p in inner_first})


def run_or_reuse(run: Array, inner: nnx.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The module's output where `run` is true, else `output`."""
    return jax.lax.cond(
        run,
        lambda: inner(*args),  # type: ignore[operator]
        lambda: output,
    )


@dataclasses.dataclass
class Order:
    """The calls of all parts of a pass, in the order in which it enters them.

    Attributes:
        paths: the part of each call.
        ends: number of the first call that is neither this one nor inside it.
    """

    paths: list[str] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)

    def enter(self, path: str) -> int:
        """Begins a call, and returns its number for `leave`."""
        self.paths.append(path)
        self.ends.append(-1)
        return len(self.paths) - 1

    def leave(self, number: int) -> None:
        """Ends a call."""
        self.ends[number] = len(self.paths)

    def extend(self, inside: "Order", times: int) -> None:
        """Adds a loop's rounds."""
        for _ in range(times):
            self.ends += [len(self.paths) + end for end in inside.ends]
            self.paths += inside.paths


def downstream(order: Order, layers: Collection[str], layout: Layout) -> frozenset[tuple[str, int]]:
    """The calls of parts that must run when the outputs of these layers are perturbed.

    A perturbed layer itself runs only if another one's perturbation reaches it, or its own, from an
    earlier call.

    Args:
        order: all calls of a pass.
        layers: the perturbed layers.
        layout: of the network.

    Returns:
        Each part with the number of its call, counted from 0.
    """
    called: collections.Counter[str] = collections.Counter()
    calls = []
    for path in order.paths:
        calls.append((path, called[path]))
        called[path] += 1
    found: set[tuple[str, int]] = set()
    for layer in layers:
        places = [place for place, path in enumerate(order.paths) if path == layer]

        def runs(place: int, layer: str = layer, places: list[int] = places) -> bool:
            part, call = calls[place]
            inside = bisect.bisect_right(places, place)
            if inside < len(places) and places[inside] < order.ends[place]:
                return True
            if place <= places[0] or layout.is_independent(part, layer):
                return False
            # A later call of the part may still depend on the layer.
            return call > 0 or not layout.take_same_input(part, layer)

        found.update(calls[place] for place in range(len(calls)) if runs(place))
    return frozenset(found)
