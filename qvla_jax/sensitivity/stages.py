"""Replays only what follows a perturbation.

The network is cut into stages (patch embeddings, transformer blocks, projectors), and further into
parts: both towers together, the halves of a block, single layers. Each is wrapped to either run or
return the output of the unperturbed pass, depending on a flag that is an argument of the compiled
function: one program replays from any layer, and the prefix costs a copy. Parts are nested; the
inside of a part that does not run costs nothing.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from flax import nnx

from qvla_jax.array_typing import Array
from qvla_jax.families.prismatic.network.llama import SAME_INPUT
from qvla_jax.models.surgery import get_module, named_modules, replace_modules

# Full matches on module paths; no stage may be inside another.
_STAGES = (
    r".+\.(blocks|layers)\.\d+",
    r".+\.patch_embed",
    r"(proprio_)?projector",
)
# Further parts that are reused as a whole, around stages and inside them.
_PARTS = (
    r"vision_backbone",
    r".+\.(blocks|layers)\.\d+\.(block\.)?(attn|self_attn|mlp)",
)


class Stage(nnx.Module):
    """A module whose calls go through a function of (path, module, arguments)."""

    def __init__(self, inner: nnx.Module, path: str, call: Callable[..., Array]):
        self.inner = inner
        self.path = path
        self.call = call

    def __call__(self, *args: Any) -> Array:
        """The function's result for the call."""
        return self.call(self.path, self.inner, *args)


def stage_paths(model: nnx.Module) -> tuple[str, ...]:
    """Paths of all stages, in no particular order."""
    return _matching(model, _STAGES)


def part_paths(model: nnx.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Paths of all reusable parts, including stages and these layers, in no particular order."""
    return tuple(dict.fromkeys((*_matching(model, (*_STAGES, *_PARTS)), *layers)))


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


def downstream(order: Sequence[str], layers: Collection[str]) -> frozenset[str]:
    """The parts that must run when the outputs of these layers are perturbed.

    A perturbed layer itself runs only if another one's perturbation reaches it.

    Args:
        order: paths of all parts in the order in which the forward pass enters them.
        layers: the perturbed layers.
    """
    entered = {path: number for number, path in enumerate(order)}
    return frozenset(
        part
        for part in order
        if any(
            layer.startswith(f"{part}.")
            or (entered[part] > entered[layer] and not _parallel(part, layer))
            for layer in layers
        )
    )


def _parallel(part: str, layer: str) -> bool:
    """Whether a part that is entered after a layer is nevertheless independent of it."""
    first, second = part.split("."), layer.split(".")
    if first[0] == second[0] == "vision_backbone" and len(first) > 1 and first[1] != second[1]:
        # The two towers are independent of each other.
        return True
    if first[0] == "proprio_projector" and second[0] in ("vision_backbone", "projector"):
        return True
    siblings = first[:-1] == second[:-1]
    return siblings and any(first[-1] in names and second[-1] in names for names in SAME_INPUT)
