"""`Layout`: what the rest of the package knows of a policy's network, as data.

Quantization, sensitivities, packing, evaluation and reports read these names and numbers and spell
no module of any family. Each family makes the layout of a configuration in its `layout.py`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from qvla_jax.array_typing import AnyArray, Float
from qvla_jax.quantization.layers import LayerRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of a network's modules, and numbers of a call.

    Patterns are regular expressions on dotted module paths, such as
    `language_model.model.layers.0.mlp.up_proj`. They match from the start (`re.match`), those of
    `stages` and `parts` the whole path.
    """

    # Linear layers that are quantized, and those that keep the source's bits. Every linear layer is
    # one or the other.
    rules: LayerRules
    kept: tuple[str, ...]
    # Modules that run one after the other, none inside another: streamed sweeps hold the weights of
    # one at a time, and replays start between them. A module is called, not one of its methods.
    stages: tuple[str, ...]
    # Further modules that a replay can reuse as a whole, around stages or inside them.
    parts: tuple[str, ...] = ()
    # (part, layer): the part does not depend on the layer, even if it runs later.
    independent: tuple[tuple[str, str], ...] = ()
    # Last names of layers of one module that take the same input.
    same_input: tuple[tuple[str, ...], ...] = ()
    # (pattern, times): how often a call of the policy reads a layer's weights, such as once for
    # each decoded token or Euler step. The first pattern that matches counts; other layers are read
    # once. All cameras of an observation share one read.
    reads: tuple[tuple[str, int], ...] = ()
    # Paths of modules that checkpoints hold and no call of the policy reads.
    unread: tuple[str, ...] = ()
    # (pattern, replacement) of `re.sub`, one after the other: a layer's path -> its module type,
    # the same for layers of one kind at any depth.
    module_types: tuple[tuple[str, str], ...]
    # In the same way: a layer's path -> a short name for the margins of figures.
    short_names: tuple[tuple[str, str], ...] = ()
    # What tables group modules by: the text that the first matching pattern matches.
    groups: tuple[str, ...] = (r"[^.]+",)
    # Entries of the normalized action that the robot executes, the grippers among them, and names
    # for tables; empty where entries have none.
    action_entries: tuple[int, ...]
    grippers: tuple[int, ...] = ()
    action_names: tuple[str, ...] = ()
    # Actions of a chunk, from the first, that the robot executes before it asks again; None: all.
    executed_steps: int | None = None

    def module_type(self, path: str) -> str:
        """The module type of a layer."""
        return _substituted(path, self.module_types)

    def short_name(self, path: str) -> str:
        """A layer's name for narrow margins."""
        return _substituted(path, self.short_names)

    def group(self, path: str) -> str:
        """The group of modules that a module belongs to."""
        for pattern in self.groups:
            if found := re.match(pattern, path):
                return found[0]
        return path

    def reads_of(self, path: str) -> int:
        """How often a call of the policy reads a layer's weights."""
        if any(path == name or path.startswith(f"{name}.") for name in self.unread):
            return 0
        return next((times for pattern, times in self.reads if re.match(pattern, path)), 1)

    def take_same_input(self, first: str, second: str) -> bool:
        """Whether two layers of one module take the same input."""
        (parent, _, name), (other, _, sibling) = first.rpartition("."), second.rpartition(".")
        together = any(name in names and sibling in names for names in self.same_input)
        return parent == other and together

    def is_independent(self, part: str, layer: str) -> bool:
        """Whether a part is declared independent of a layer, even if it runs later."""
        return any(re.match(p, part) and re.match(q, layer) for p, q in self.independent)

    def executed(self, chunks: Float[AnyArray, "*b h a"]) -> Any:
        """What the robot executes of normalized chunks: the first actions, its own entries.

        Returns:
            [..., s, e], an array of the same kind.
        """
        if self.executed_steps is not None:
            chunks = chunks[..., : self.executed_steps, :]
        if self.action_entries == tuple(range(chunks.shape[-1])):
            return chunks
        return chunks[..., list(self.action_entries)]

    def action_weights(self, of: Mapping[int, float], dimensions: int) -> tuple[float, ...]:
        """Weights of all action entries: 0 for those that the robot does not execute.

        Args:
            of: weights of single entries; others count once.
            dimensions: entries of the network's action.
        """
        counted = frozenset(self.action_entries)
        return tuple(of.get(i, 1.0) if i in counted else 0.0 for i in range(dimensions))


def _substituted(path: str, substitutions: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in substitutions:
        path = re.sub(pattern, replacement, path)
    return path
