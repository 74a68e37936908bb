"""LoRA as openpi trains it: kept next to the weights, merged as each weight is read.

In the public variants alpha / rank is 1, so a weight w becomes w + a b. Of the weights of an
einsum, each head has its own a and b. The output projection sums over heads, and openpi's
equations sum each half by itself: there every head's a meets the sum of all heads' b.
"""

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from qvla_jax.errors import CheckpointError
from qvla_jax.families.openpi.orbax_tree import StoredLeaf

# Of openpi's `gemma_2b_lora` and `gemma_300m_lora`, by the suffix of the expert.
_RANKS: Final = {"": 16, "_1": 32}
_ADAPTER: Final = re.compile(
    r"(?P<module>.*/(?:q|kv|attn_vec)_einsum(?P<attn>_1)?)/lora_(?P<half>[ab])"
    r"|(?P<mlp>.*/mlp(?P<ffn>_1)?/(?:gating_einsum|linear))_lora_(?P<part>[ab])"
)


class Adapters:
    """The adapters of a tree, by the leaf that each adapts."""

    def __init__(
        self, tree: Mapping[str, StoredLeaf], shapes: Mapping[str, tuple[int, ...]], source: str
    ):
        """Finds and checks them.

        Args:
            tree: all leaves of the checkpoint.
            shapes: of the weights.
            source: what errors name.

        Raises:
            CheckpointError: a half is missing, adapts no weight, has a shape that does not fit, or
                has a rank whose alpha no public variant defines.
        """
        self._halves: dict[str, dict[str, np.ndarray | StoredLeaf]] = {}
        names: dict[str, dict[str, str]] = {}
        for name in tree:
            if match := _ADAPTER.fullmatch(name):
                adapted = f"{match['module']}/w" if match["module"] else match["mlp"]
                half = match["half"] or match["part"]
                names.setdefault(adapted, {})[half] = name
                if adapted not in shapes or adapted not in tree:
                    raise CheckpointError(
                        f"{source}: parameter {name!r} adapts {adapted!r}, which is missing"
                    )
                *lead, fan_in, out = shapes[adapted]
                rank = _RANKS[match["attn"] or match["ffn"] or ""]
                expected = (*lead, fan_in, rank) if half == "a" else (*lead, rank, out)
                if tree[name].shape != expected:
                    raise CheckpointError(
                        f"{source}: parameter {name!r} has shape {tree[name].shape}, expected "
                        f"{expected}: the scale of adapters is known for openpi's own variants "
                        "alone; merge others with openpi first"
                    )
                self._halves.setdefault(adapted, {})[half] = tree[name]
        for halves in names.values():
            if len(halves) < 2:
                raise CheckpointError(
                    f"{source}: parameter {next(iter(halves.values()))!r} has no other half"
                )
        self.names = frozenset(n for halves in names.values() for n in halves.values())

    def __contains__(self, leaf: object) -> bool:
        return leaf in self._halves

    def merged(self, leaf: str, index: tuple[int, ...], value: np.ndarray) -> np.ndarray:
        """The weight at an index with its adapter, in the weight's dtype."""
        halves = self._halves[leaf]
        a, b = (np.asarray(self._held(halves, half)[index], np.float32) for half in "ab")
        if "attn_vec_einsum" in leaf:
            b = b.sum(axis=0, keepdims=True)
        return (value.astype(np.float32) + a @ b).astype(value.dtype)

    def _held(self, halves: dict[str, np.ndarray | StoredLeaf], half: str) -> np.ndarray:
        """The whole of a half: some ten megabytes at most, read once."""
        held = halves[half]
        if isinstance(held, StoredLeaf):
            halves[half] = held = held.read()
        return held
