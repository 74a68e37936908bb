"""Replaying only what lies behind a perturbation.

The network is cut into stages (patch embeddings, transformer blocks, projectors). Each is wrapped
so that it either runs or hands out the output of the unperturbed pass, by a flag that is an
argument of the compiled function: one program replays from any stage, and the prefix costs a copy.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Array, Bool
from qvla_jax.models.surgery import get_module, named_modules, replace_modules

# Full matches on module paths; none may lie inside another.
_STAGES = (
    r".+\.(blocks|layers)\.\d+",
    r".+\.patch_embed",
    r"(proprio_)?projector",
)


class Stage(nnx.Module):
    """A module whose calls go through a function of (path, module, arguments)."""

    def __init__(self, inner: nnx.Module, path: str, call: Callable[..., Array]):
        self.inner = inner
        self.path = path
        self.call = call

    def __call__(self, *args: Any) -> Array:
        """Whatever the function makes of the call."""
        return self.call(self.path, self.inner, *args)


def stage_paths(model: nnx.Module) -> tuple[str, ...]:
    """Paths of all stages, in no particular order."""
    return tuple(
        path
        for path in named_modules(model, nnx.Module)
        if any(re.fullmatch(pattern, path) for pattern in _STAGES)
    )


def wrap_stages(model: nnx.Module, paths: Sequence[str], call: Callable[..., Array]) -> None:
    """Puts a `Stage` around each of these modules, in place."""
    replace_modules(model, {p: Stage(get_module(model, p), p, call) for p in paths})


def replay_or_reuse(run: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[..., Array]:
    """A stage call that runs where `run[path]` is true and else returns `outputs[path]`."""

    def call(path: str, inner: nnx.Module, *args: Any) -> Array:
        if path not in outputs:
            return inner(*args)  # type: ignore[operator]
        return jax.lax.cond(
            run[path],
            lambda: inner(*args),  # type: ignore[operator]
            lambda: outputs[path],
        )

    return call


def downstream(
    stages: Sequence[str], positions: Mapping[str, int], layers: Sequence[str]
) -> dict[str, Bool[np.ndarray, ""]]:
    """Which stages have to run when these layers are perturbed.

    Args:
        stages: stage paths in the order in which the forward pass calls them.
        positions: for each layer, the number of stages that were called before it, its own
            excluded.
        layers: the perturbed layers.
    """
    return {
        stage: np.asarray(any(number >= positions[p] and not _parallel(stage, p) for p in layers))
        for number, stage in enumerate(stages)
    }


def _parallel(stage: str, layer: str) -> bool:
    """The two vision towers do not see each other."""
    first, second = stage.split(".")[:2], layer.split(".")[:2]
    return first[0] == second[0] == "vision_backbone" and first[1] != second[1]
