"""Finding and replacing modules by their public dotted path.

Instrumentation and packing wrap or replace single modules instead of adding hooks to the model
code, as `nnx` itself does for LoRA.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def path_string(path: tuple[Any, ...]) -> str:
    """`("blocks", 0, "attn")` -> `"blocks.0.attn"`, the spelling of the public checkpoints."""
    return ".".join(str(p) for p in path)


def named_modules(model: nnx.Module, kind: type[M]) -> dict[str, M]:
    """All modules of a type by dotted path, in the alphabetical order of paths.

    Args:
        model: any NNX module.
        kind: the type looked for, subclasses included.

    Returns:
        Dotted path -> module. Indices are ordered as numbers: block 2 comes before block 10.
    """
    found = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, kind)}
    return {path_string(p): found[p] for p in sorted(found, key=_natural_order)}


def _natural_order(path: tuple[Any, ...]) -> tuple[tuple[bool, Any], ...]:
    return tuple((isinstance(p, str), p) for p in path)


def get_module(model: nnx.Module, path: str) -> nnx.Module:
    """The module at a dotted path.

    Raises:
        KeyError: there is no module at this path.
    """
    node: Any = model
    for part in path.split("."):
        try:
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        except (AttributeError, IndexError, TypeError):
            raise KeyError(f"no module {path!r}: {part!r} was not found") from None
    return node


def replace_modules(model: nnx.Module, replacements: Mapping[str, nnx.Module]) -> None:
    """Puts other modules in place of those at the given dotted paths, in place.

    Raises:
        KeyError: there is no module at a path.
    """
    for path, module in replacements.items():
        get_module(model, path)
        parent, _, leaf = path.rpartition(".")
        owner: Any = get_module(model, parent) if parent else model
        if leaf.isdigit():
            owner[int(leaf)] = module
        else:
            setattr(owner, leaf, module)
