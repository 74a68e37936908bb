"""PyTorch weights of pi0 and pi0.5: openpi's own conversion, and LeRobot's.

Both are one safetensors file with the same names, LeRobot's with `model.` in front. A weight is
[c, k]. Both files hold what no policy reads: an output layer of the action expert, and either or
both names of the token embeddings, which are tied to PaliGemma's output layer.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvla_jax.checkpoints.tensor_files import TensorFile
from qvla_jax.checkpoints.weights import is_finite
from qvla_jax.errors import CheckpointError
from qvla_jax.families.openpi.names import Slot, slots
from qvla_jax.families.openpi.network import FlowMatching

FILE: Final = "model.safetensors"
_PREFIX: Final = "model."
_PALIGEMMA: Final = "paligemma_with_expert.paligemma."
_VISION: Final = f"{_PALIGEMMA}model.vision_tower.vision_model."
_LANGUAGE: Final = f"{_PALIGEMMA}model.language_model."
_EXPERT: Final = "paligemma_with_expert.gemma_expert.model."
_EMBEDDINGS: Final = f"{_LANGUAGE}embed_tokens.weight"
# Tied to the embeddings; the only name left if a library stores tied tensors once.
_TIED: Final = f"{_PALIGEMMA}lm_head.weight"
# Of the action expert: never trained, never read.
_UNREAD: Final = frozenset({"paligemma_with_expert.gemma_expert.lm_head.weight"})
# What LeRobot drops when it loads pi0.5.
_UNREAD_PI05: Final = frozenset({"state_proj.weight", "state_proj.bias"})

# Our modules -> PyTorch's; modules not listed have the same name.
_MODULES: Final = {
    "PaliGemma.img.embedding": f"{_VISION}embeddings.patch_embedding",
    "PaliGemma.img.pos_embedding": f"{_VISION}embeddings.position_embedding",
    "PaliGemma.img.Transformer.encoder_norm": f"{_VISION}post_layernorm",
    "PaliGemma.img.head": f"{_PALIGEMMA}model.multi_modal_projector.linear",
    "PaliGemma.llm.embedder": f"{_LANGUAGE}embed_tokens",
    "PaliGemma.llm.final_norm": f"{_LANGUAGE}norm",
    "PaliGemma.llm.final_norm_1": f"{_EXPERT}norm",
    "PaliGemma.llm.final_norm_1.Dense_0": f"{_EXPERT}norm.dense",
}
# The same for modules of a layer, of the tower and of either expert.
_TOWER_LAYER: Final = re.compile(r"PaliGemma\.img\.Transformer\.encoderblock\.(\d+)\.(.*)")
_OF_TOWER: Final = {
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MultiHeadDotProductAttention_0.query": "self_attn.q_proj",
    "MultiHeadDotProductAttention_0.key": "self_attn.k_proj",
    "MultiHeadDotProductAttention_0.value": "self_attn.v_proj",
    "MultiHeadDotProductAttention_0.out": "self_attn.out_proj",
    "MlpBlock_0.Dense_0": "mlp.fc1",
    "MlpBlock_0.Dense_1": "mlp.fc2",
}
_LAYER: Final = re.compile(r"PaliGemma\.llm\.layers\.(\d+)\.(.*)")
_OF_LAYER: Final = {
    "attn.q_einsum": "self_attn.q_proj",
    "attn.k_einsum": "self_attn.k_proj",
    "attn.v_einsum": "self_attn.v_proj",
    "attn.attn_vec_einsum": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.linear": "mlp.down_proj",
    "pre_attention_norm": "input_layernorm",
    "pre_ffw_norm": "post_attention_layernorm",
    "pre_attention_norm.Dense_0": "input_layernorm.dense",
    "pre_ffw_norm.Dense_0": "post_attention_layernorm.dense",
}


def torch_name(path: str) -> str:
    """PyTorch's name of a parameter of ours."""
    module, _, leaf = path.rpartition(".")
    if leaf == "pos_embedding":  # a parameter there, too, but of a module of its own
        module = path
    if match := _TOWER_LAYER.fullmatch(module):
        module = f"{_VISION}encoder.layers.{match[1]}.{_OF_TOWER[match[2]]}"
    elif match := _LAYER.fullmatch(module):
        part = re.sub(r"_1\b", "", match[2])
        stack = _LANGUAGE if part == match[2] else _EXPERT
        module = f"{stack}layers.{match[1]}.{_OF_LAYER[part]}"
    else:
        module = _MODULES.get(module, module)
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


def torch_shape(path: str, slot: Slot) -> tuple[int, ...]:
    """Shape of a parameter in the file."""
    shape = slot.flax_shape
    if path == "PaliGemma.img.embedding.kernel":
        height, width, colours, channels = slot.shape
        return channels, colours, height, width
    if path == "PaliGemma.img.pos_embedding":
        return shape[1:]
    return shape[::-1] if path.endswith(".kernel") else shape


def from_torch(path: str, slot: Slot, value: np.ndarray) -> np.ndarray:
    """PyTorch's layout -> Flax's."""
    if path == "PaliGemma.img.embedding.kernel":
        return value.transpose(2, 3, 1, 0).reshape(slot.flax_shape)
    return (value.T if path.endswith(".kernel") else value).reshape(slot.flax_shape)


def to_torch(path: str, slot: Slot, value: np.ndarray) -> np.ndarray:
    """Inverse of `from_torch`."""
    if path == "PaliGemma.img.embedding.kernel":
        return value.reshape(slot.shape).transpose(3, 2, 0, 1)
    return (value.T if path.endswith(".kernel") else value).reshape(torch_shape(path, slot))


def is_openpi(path: Path) -> bool:
    """Whether a safetensors file holds a pi0 or pi0.5."""
    return "action_in_proj/kernel" in leaves(path)


def leaves(path: Path) -> set[str]:
    """Top-level leaves of the file under openpi's names, which identify the variant.

    Raises:
        CheckpointError: the file is damaged.
    """
    names = {name.removeprefix(_PREFIX) for name in TensorFile(path)}
    found = {f"{name.removesuffix('.weight')}/kernel" for name in names if name.count(".") == 1}
    # LeRobot's pi0.5 may have pi0's state projection, which is not read.
    return found - {"state_proj/kernel"} if "time_mlp_in/kernel" in found else found


class TorchTensors(Mapping[str, np.ndarray]):
    """The weights of a file by the paths of our parameters, in Flax's layout."""

    def __init__(self, path: Path, model: FlowMatching):
        """Reads names and shapes.

        Raises:
            CheckpointError: the file is damaged, or a tensor is missing, unexpected or of the wrong
                shape. The message names it.
        """
        self._path, self._slots = path, slots(model)
        self._file = TensorFile(path)
        prefixed = all(name.startswith(_PREFIX) for name in self._file)
        self._stored = {n.removeprefix(_PREFIX) if prefixed else n: n for n in self._file}
        self._names = {own: torch_name(own) for own in self._slots}
        self._check(model.config.variant)

    def dtype(self, path: str) -> np.dtype[Any]:
        """Of a parameter, as stored."""
        return self._file.spec(self._stored[self._names[path]])[0]

    def __getitem__(self, path: str) -> np.ndarray:
        name = self._names[path]
        value = self._read(name)
        if not is_finite(value):
            raise CheckpointError(f"{self._path}: tensor {name!r} holds NaN or inf")
        return from_torch(path, self._slots[path], value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def _read(self, name: str) -> np.ndarray:
        return self._file[self._stored[name]]

    def _check(self, variant: str) -> None:
        expected = {self._names[own]: torch_shape(own, slot) for own, slot in self._slots.items()}
        unread = _UNREAD | (_UNREAD_PI05 if variant == "pi05" else set())
        if _TIED in self._stored:
            # The public loaders copy from this name, whether the other is there or not.
            own = next(own for own, name in self._names.items() if name == _EMBEDDINGS)
            self._names[own] = _TIED
            expected[_TIED] = expected.pop(_EMBEDDINGS)
            unread = unread | {_EMBEDDINGS}
        found = self._stored.keys() - unread
        missing, unexpected = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing:
            other = f"; there is {unexpected[0]!r}, which is unexpected" if unexpected else ""
            raise CheckpointError(
                f"{self._path}: tensor {missing[0]!r} of shape {expected[missing[0]]} is missing "
                f"({len(missing)} in all){other}"
            )
        if unexpected:
            raise CheckpointError(
                f"{self._path}: tensor {unexpected[0]!r} of shape "
                f"{self._read(unexpected[0]).shape} is unexpected ({len(unexpected)} in all): the "
                "file belongs to another architecture"
            )
        for name, shape in expected.items():
            if (stored := self._read(name).shape) != shape:
                raise CheckpointError(
                    f"{self._path}: tensor {name!r} has shape {stored}, expected {shape}"
                )
