"""The rounded weights of a quantized policy as ordinary parameters, which public layouts hold."""

import collections
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax import kernels
from qvla_jax.atomic import write_json
from qvla_jax.checkpoints.files import check_empty, emptied_on_error
from qvla_jax.errors import InputError
from qvla_jax.inference.loading import load_policy
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.parity import Parity, chunks_of, noise_inputs, parity_of
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.unpacking import RoundingLinear, folded
from qvla_jax.models.linear import Embed
from qvla_jax.models.surgery import named_modules, path_string
from qvla_jax.precision import in_32_bits
from qvla_jax.provenance import package_versions
from qvla_jax.quantization.layers import quantizable_layers
from qvla_jax.quantization.layout import source_bytes

RECORD: Final = "dequantized.json"
# What quantized policies have and public layouts may have no room for.
LeftOut: TypeAlias = Literal["bias-corrections", "activation-rounding"]
_REMEDIES: Final[dict[LeftOut, str]] = {
    "bias-corrections": "quantize without bias correction, such as by `qvla quantize --method "
    "gptq-w4` or `qvla pack`, ",
    "activation-rounding": "quantize without rounding activations, ",
}


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """A quantized policy with ordinary layers, and what became of the rest.

    Attributes:
        policy: in the modules of full precision; `Policy.export` writes it.
        dtype: of all its parameters.
        left_out: paths of the layers that lost something.
        unread: parameters that a packed file does not hold because inference never reads them;
            zeros.
    """

    policy: Policy
    dtype: np.dtype[Any]
    left_out: dict[LeftOut, tuple[str, ...]]
    unread: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What became of the rest, as JSON types."""
        return {
            "dtype": self.dtype.name,
            "left_out": {kind: list(layers) for kind, layers in self.left_out.items()},
            "zeros_for_unread": list(self.unread),
        }


def export_dequantized(
    policy: Policy, out: Path, *, dtype: Any = None, leave_out: Collection[LeftOut] = ()
) -> tuple[dict[str, Any], Parity]:
    """Writes the rounded weights of a quantized policy as a public directory.

    The directory is loaded again; what changed in the actions is also written, to
    `dequantized.json` in it.

    Args:
        policy: see `dequantized`.
        out: an empty or new folder; nothing stays in it after an error.
        dtype: see `dequantized`.
        leave_out: see `dequantized`.

    Returns:
        `Dequantized.record`, and the actions of the directory against those of the policy.

    Raises:
        InputError: see `dequantized`; or `out` holds files already.
    """
    check_empty(out)
    found = dequantized(policy, dtype=dtype, leave_out=leave_out)
    with emptied_on_error(out):
        found.policy.export(out)
        record, dtype = found.record(), found.dtype
        del found  # whose weights may be large, before they are loaded again
        inputs = noise_inputs(policy)
        own = chunks_of(policy, inputs)
        parity = parity_of(policy, own, chunks_of(load_policy(out, dtype=dtype), inputs))
        write_json(
            out / RECORD,
            {
                "format": "qvla_jax.dequantized",
                "version": 1,
                "quantization": policy.quantization,
                **record,
                "parity": dataclasses.asdict(parity),
                "packages": package_versions(),
            },
        )
    return record, parity


@in_32_bits
def dequantized(
    policy: Policy, *, dtype: Any = None, leave_out: Collection[LeftOut] = ()
) -> Dequantized:
    """The policy with its rounded weights in ordinary layers.

    Scales and rotations of a layer's inputs become part of its weight. A bias that quantization
    added has room where the full-precision layer has a bias.

    Args:
        policy: quantized, packed or not.
        dtype: of all parameters; None: bfloat16 if all that quantization left alone fits in it, as
            in public checkpoints, or else float32.
        leave_out: what may get lost.

    Raises:
        InputError: the policy is not quantized, or something would get lost that may not; the
            message names the layers.
    """
    if policy.quantization is None:
        raise InputError(f"{policy.config.name}: is not quantized; export it without --dequantized")
    model = policy.family.abstract_model(policy.config)
    left_out: dict[LeftOut, tuple[str, ...]] = {}
    if rounding := _rounding_layers(policy):
        left_out["activation-rounding"] = rounding
    dtype = np.dtype(_public_dtype(policy, model) if dtype is None else dtype)
    missing = {
        path_string(path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    biases = []
    for name, value in _parameters(policy):
        layer, _, leaf = name.rpartition(".")
        if name in missing:
            missing.pop(name).set_value(jnp.asarray(value.astype(dtype)))
        elif leaf == "bias":
            biases += [layer] if value.any() else []
        else:
            raise InputError(
                f"{policy.config.name}: its public layout has no room for {name!r}, which took the "
                "place of other weights when `qvla pack` packed it; export a file of `qvla "
                "quantize`, or the full-precision policy's name with @ and bits"
            )
    # Packing leaves out what inference never reads, and nothing else.
    for variable in missing.values():
        variable.set_value(jnp.zeros(variable.shape, dtype))
    if biases:
        left_out["bias-corrections"] = tuple(sorted(biases))
    for kind, layers in left_out.items():
        if kind not in leave_out:
            types = collections.Counter(map(policy.layout.module_type, layers))
            named = ", ".join(f"{count} {name}" for name, count in types.items())
            raise InputError(
                f"{policy.config.name}: its public layout has no room for the "
                f"{kind.replace('-', ' ')} of {len(layers)} layers ({named}): "
                f"{_REMEDIES[kind]}or accept what it costs with --leave-out {kind}"
            )
    return Dequantized(
        dataclasses.replace(policy, model=model, quantization=None),
        dtype,
        left_out,
        tuple(missing),
    )


def _parameters(policy: Policy) -> Iterator[tuple[str, np.ndarray]]:
    """Dotted path and value of every parameter, as if nothing were packed."""
    rounding = named_modules(policy.model, RoundingLinear)
    for path, variable in nnx.to_flat_state(nnx.state(policy.model, nnx.Param)):
        if path_string(path[:-1]) not in rounding:
            yield path_string(path), np.asarray(variable[...])
    for path, layer in rounding.items():
        kernel = folded(layer.kernel[...], layer.scale[...], rotated=layer.rotated)
        yield f"{path}.kernel", np.asarray(kernel)
        yield f"{path}.bias", np.asarray(layer.bias[...])
    for path, layer in packed_layers(policy.model).items():
        weight, inputs = layer.weight, layer.inputs
        kernel = folded(kernels.dequantize(weight).T, inputs.scale, rotated=inputs.rotated)
        yield f"{path}.kernel", np.asarray(kernel)
        if weight.bias is not None:
            yield f"{path}.bias", np.asarray(weight.bias)
    for path, table in packed_embeddings(policy.model).items():
        yield f"{path}.embedding", np.asarray(kernels.dequantize(table.weight))


def _rounding_layers(policy: Policy) -> tuple[str, ...]:
    """Layers that round their inputs."""
    packed = packed_layers(policy.model)
    found = [path for path, layer in packed.items() if layer.activation_bits != 16]
    others = named_modules(policy.model, RoundingLinear)
    found += [path for path, layer in others.items() if float(layer.largest_code[...])]
    return tuple(sorted(found))


def _public_dtype(policy: Policy, model: nnx.Module) -> Any:
    """Bfloat16 if all parameters that quantization left alone fit in it, or else float32."""
    changed = {
        *quantizable_layers(model, policy.layout.rules),
        *packed_layers(policy.model),
        *named_modules(model, Embed),
    }
    for path, variable in nnx.to_flat_state(nnx.state(policy.model, nnx.Param)):
        if path_string(path[:-1]) not in changed and source_bytes(np.asarray(variable[...])) != 2:
            return jnp.float32
    return jnp.bfloat16
