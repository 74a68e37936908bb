"""Packed layers as qwix's `QArray`s, which JAX users multiply by without this package.

An orbax checkpoint holds a tree of the policy's parameters by module, such as

    language_model / model / layers / 0 / mlp / up_proj / kernel / {qvalue [k, c], scale [g, c]},

so that `qwix.QArray(**kernel)` is the array. qvalue is int8 if a channel has 8 bits, or else int4,
which hold the codes of all narrower widths and grids; a pruned channel has codes 0. Scales are
float32, so that what qwix multiplies by are exactly our own weights.
"""

from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from qvla_jax import kernels
from qvla_jax.array_typing import Float
from qvla_jax.atomic import write_json
from qvla_jax.checkpoints.files import check_empty, emptied_on_error
from qvla_jax.checkpoints.orbax_weights import quiet
from qvla_jax.errors import InputError
from qvla_jax.families.registry import to_record
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import PackedLinear, packed_layers
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.saving import write_files
from qvla_jax.inference.unpacking import folded
from qvla_jax.kernels.codes import unpack_words
from qvla_jax.kernels.packed import segment_rows
from qvla_jax.models.surgery import path_string
from qvla_jax.precision import in_32_bits
from qvla_jax.provenance import package_versions
from qvla_jax.quantization.codes import SOURCE

PARAMS: Final = "params"
DESCRIPTION: Final = "params.json"


@in_32_bits
def export_qarrays(policy: Policy, out: Path) -> dict[str, Any]:
    """Writes a folder with the parameters, a description, and the processor's files.

    Args:
        policy: packed.
        out: an empty or new folder; nothing stays in it after an error.

    Returns:
        The description: which layers are `QArray`s, which are dense and why, and which round their
        inputs.

    Raises:
        InputError: no layer is packed, or `out` holds files already.
    """
    layers = packed_layers(policy.model)
    if not layers:
        raise InputError(
            f"{policy.config.name}: no layer is packed; give a .qvla file, such as those that "
            "`qvla quantize` and `qvla pack` write"
        )
    check_empty(out)
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(policy.model, nnx.Param)):
        _put(tree, path_string(path), jnp.asarray(variable[...]))
    quantized: dict[str, str] = {}
    dense: dict[str, str] = {}
    for path, layer in layers.items():
        weight, inputs = layer.weight, layer.inputs
        if (reason := why_dense(layer)) is None:
            kernel: Any = qarray_parts(weight)
            quantized[path] = kernel["qvalue"].dtype.name
        else:
            dense[path] = reason
            kernel = folded(kernels.dequantize(weight).T, inputs.scale, rotated=inputs.rotated)
        _put(tree, f"{path}.kernel", kernel)
        if weight.bias is not None:
            _put(tree, f"{path}.bias", jnp.asarray(weight.bias))
    for path, table in packed_embeddings(policy.model).items():
        # A scale for each token: [v, c] and [v, 1].
        parts = {name: value.T for name, value in qarray_parts(table.weight).items()}
        quantized[path] = parts["qvalue"].dtype.name
        _put(tree, f"{path}.embedding", parts)
    rounded = {p: v.activation_bits for p, v in layers.items() if v.activation_bits != SOURCE}
    description = {
        "format": "qvla_jax.qarrays",
        "version": 1,
        "policy": policy.config.name,
        "qarrays": quantized,
        "dense": dense,
        "activation_bits": rounded,
        "statistics": {"unnorm_key": policy.config.unnorm_key, "by_data_set": policy.statistics},
        "config": to_record(policy.config),
        "packages": package_versions(),
    }
    with emptied_on_error(out):
        out.mkdir(parents=True, exist_ok=True)
        with ocp.StandardCheckpointer() as checkpointer, quiet():
            checkpointer.save((out / PARAMS).resolve(), tree)
        write_files(policy.processor, out)
        write_json(out / DESCRIPTION, description)
    return description


def why_dense(layer: PackedLinear) -> str | None:
    """Why a layer has no `QArray`; None if it has one."""
    weight, inputs = layer.weight, layer.inputs
    if any(segment.bits == SOURCE for segment in weight.segments):
        return "a channel keeps its 16 bits"
    if inputs.scale is not None:
        return "its inputs are scaled"
    if inputs.rotated:
        return "its inputs are rotated"
    if weight.group is not None and weight.shape[1] % weight.group:
        return f"groups of {weight.group} do not divide its {weight.shape[1]} inputs"
    return None


def qarray_parts(weight: kernels.PackedWeight) -> dict[str, jax.Array]:
    """Arguments of a `QArray` of the kernel [k, c]: qvalue [k, c] and scale [g, c].

    Args:
        weight: on the host, without 16-bit rows.
    """
    c, k = weight.shape
    wide = any(segment.bits == 8 for segment in weight.segments)
    codes = np.zeros((c, k), np.int8)
    scales: Float[np.ndarray, "c g"] = np.ones((c, weight.num_groups), np.float32)
    for number, segment in enumerate(weight.segments):
        rows = segment_rows(weight, number)
        unsigned = unpack_words(weight.words[number], segment.bits, k).astype(np.int16)
        codes[rows] = unsigned * segment.code_map.multiplier + segment.code_map.offset
        scales[rows] = weight.scales[number].astype(np.float32)
    values = codes if wide else codes.astype(ml_dtypes.int4)
    return {"qvalue": jnp.asarray(values).T, "scale": jnp.asarray(scales).T}


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets a leaf by its dotted path."""
    *parents, leaf = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value
