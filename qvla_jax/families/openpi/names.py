"""Paths of our parameters <-> leaves of openpi's parameter tree.

Module paths are the public names. openpi scans over layers, so its leaves have one more axis, the
first; here every layer has modules of its own, numbered where that axis was. Stacked weights are
taken apart, so that every linear layer is an `nnx.Linear` with a kernel [k, c]:

| ours                                  | public                                     |
|---------------------------------------|--------------------------------------------|
| `llm.embedder.embedding`              | `llm/embedder/input_embedding`             |
| `..layers.i.attn.q_einsum` [k, n d]   | `../layers/attn/q_einsum/w` [i] (n, k, d)  |
| `..layers.i.attn.k_einsum` [k, m d]   | `../kv_einsum/w` [i, 0] (m, k, d)          |
| `..layers.i.attn.v_einsum` [k, m d]   | `../kv_einsum/w` [i, 1] (m, k, d)          |
| `..attn.attn_vec_einsum` [n d, c]     | `../attn_vec_einsum/w` [i] (n, d, c)       |
| `..layers.i.mlp.gate` [k, c]          | `../layers/mlp/gating_einsum` [i, 0]       |
| `..layers.i.mlp.up` [k, c]            | `../layers/mlp/gating_einsum` [i, 1]       |
| `..layers.i.mlp.linear` [k, c]        | `../layers/mlp/linear` [i]                 |
| `img.embedding` [p p 3, c]            | `img/embedding/kernel` (p, p, 3, c)        |
| `..encoderblock.i. .. .query` [k, n d] | `../encoderblock/../query` [i] (k, n, d)  |
| `..encoderblock.i. .. .out` [n d, c]  | `../encoderblock/../out` [i] (n, d, c)     |
| everything else, such as              | the same, such as                          |
| `..layers.i.pre_ffw_norm.scale`       | `../layers/pre_ffw_norm/scale` [i]         |

The action expert's have `_1` behind `q_einsum`, `mlp`, `pre_attention_norm` and so on, as there.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Final

import numpy as np
from flax import nnx

from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.network import FlowMatching
from qvla_jax.models.surgery import path_string

_LAYER: Final = re.compile(r"(llm\.layers|encoderblock)\.(\d+)\.")
_EINSUM: Final = re.compile(r"(q|k|v|attn_vec)_einsum(_1)?\.kernel$")
_HEADS: Final = re.compile(r"MultiHeadDotProductAttention_0\.(query|key|value|out)\.(kernel|bias)$")
_GATED: Final = re.compile(r"\.(mlp(?:_1)?)\.(gate|up|linear)\.kernel$")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a parameter of ours stands in the public tree."""

    # Keys of the leaf, joined by slashes.
    leaf: str
    # Layer, and which of stacked weights.
    index: tuple[int, ...]
    # Of the leaf at this index.
    shape: tuple[int, ...]
    # Axes of that in the order in which they lie in ours, where several are one.
    order: tuple[int, ...]
    # Of ours.
    flax_shape: tuple[int, ...]

    def to_flax(self, value: np.ndarray) -> np.ndarray:
        """The leaf at the index -> the parameter."""
        return value.transpose(self.order).reshape(self.flax_shape)

    def to_public(self, value: np.ndarray) -> np.ndarray:
        """Inverse of `to_flax`."""
        permuted = value.reshape([self.shape[axis] for axis in self.order])
        return permuted.transpose(np.argsort(self.order))


def parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """(dotted path, variable) of every parameter."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield path_string(path), variable


def slots(model: FlowMatching) -> dict[str, Slot]:
    """Dotted path of every parameter -> its place in the public tree; the model may be abstract.

    Ordered by leaf, then by index: a leaf is read or written from its beginning to its end.
    """
    found = {path: _slot(path, v.shape, model.config) for path, v in parameters(model)}
    return dict(sorted(found.items(), key=lambda item: (item[1].leaf, item[1].index)))


def public_shapes(model: FlowMatching) -> dict[str, tuple[int, ...]]:
    """Leaf -> shape of the whole, with its axes of layers and stacked weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in slots(model).values():  # of one leaf the last slot has the largest index
        shapes[slot.leaf] = (*(i + 1 for i in slot.index), *slot.shape)
    return shapes


def _slot(path: str, shape: tuple[int, ...], config: OpenpiConfig) -> Slot:
    index: tuple[int, ...] = ()
    name = path
    if match := _LAYER.search(path):
        index = (int(match[2]),)
        name = path.replace(match[0], f"{match[1]}.")
    expert = config.language  # heads are those of both experts
    whole, order = shape, tuple(range(len(shape)))
    if match := _EINSUM.search(name):
        kind, suffix = match[1], match[2] or ""
        width = shape[1] if kind == "attn_vec" else shape[0]
        heads = expert.num_kv_heads if kind in "kv" else expert.num_heads
        if kind == "attn_vec":
            whole, order = (heads, expert.head_dim, width), (0, 1, 2)
        else:
            whole, order = (heads, width, expert.head_dim), (1, 0, 2)
        if kind in "kv":
            index = (*index, "kv".index(kind))
            kind = "kv"
        name = f"{name[: match.start()]}{kind}_einsum{suffix}.w"
    elif match := _GATED.search(name):
        leaf = "linear" if match[2] == "linear" else "gating_einsum"
        name = f"{name[: match.start()]}.{match[1]}.{leaf}"
        if leaf == "gating_einsum":
            index = (*index, ("gate", "up").index(match[2]))
    elif match := _HEADS.search(name):
        heads = (config.vision.num_heads, config.vision.width // config.vision.num_heads)
        if match[1] != "out":
            whole = (*shape[:-1], *heads)
        elif match[2] == "kernel":
            whole = (*heads, shape[1])
        order = tuple(range(len(whole)))
    elif name == "PaliGemma.img.embedding.kernel":
        patch = config.vision.patch_size
        whole, order = (patch, patch, 3, shape[1]), (0, 1, 2, 3)
    elif name == "PaliGemma.llm.embedder.embedding":
        name = "PaliGemma.llm.embedder.input_embedding"
    assert math.prod(whole) == math.prod(shape), path
    return Slot(name.replace(".", "/"), index, whole, order, shape)
