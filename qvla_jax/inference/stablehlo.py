"""A policy as a StableHLO function that runs without this package.

The function takes the weights, packed as they are, and prepared inputs, and returns normalized
chunks. Weights are arguments, kept in a safetensors file: a StableHLO module holds constants of
less than 2 GiB in all. Our kernels are custom calls that other processes do not have; see
`kernels.portable` for what takes their place.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import jax.export
import numpy as np
from flax import nnx

from qvla_jax.array_typing import AnyArray, Array, Float
from qvla_jax.atomic import write_bytes, write_json
from qvla_jax.checkpoints.files import check_empty, emptied_on_error
from qvla_jax.checkpoints.tensor_files import write_file
from qvla_jax.families.registry import to_record
from qvla_jax.inference.fused_attention import separate_attention
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import PackedArrays, PackedLinear, packed_layers
from qvla_jax.inference.parity import Parity, chunks_of, noise_inputs, parity_of
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.saving import write_files
from qvla_jax.kernels import portable
from qvla_jax.models.surgery import path_string, replace_modules
from qvla_jax.plain import to_plain
from qvla_jax.precision import in_32_bits
from qvla_jax.provenance import package_versions

FUNCTION: Final = "policy.stablehlo"
WEIGHTS: Final = "weights.safetensors"
EXAMPLE: Final = "example.npz"
DESCRIPTION: Final = "policy.json"
PROGRAM: Final = "run.py"
PLATFORMS: Final = ("cpu", "tpu")

_INSIDE: Final = (
    "scaling of pixels, vision towers, token embeddings, language model, and the action head, "
    "greedy decoding or all steps of sampling"
)
_OUTSIDE: Final = (
    "resizing and cropping images, making and tokenizing the prompt, normalizing the state, "
    "drawing the noise of a policy that samples",
    "un-normalizing actions, by the statistics of the data set",
)
_HISTORY: Final = "the latent actions that the history of an episode's next call is made of"


@in_32_bits
def export_stablehlo(policy: Policy, out: Path) -> Parity:
    """Writes a folder with the function, its weights, a description, an example and a program.

    Args:
        policy: packed or not.
        out: an empty or new folder; nothing stays in it after an error.

    Returns:
        The actions of the function, loaded again, against the policy's own.

    Raises:
        InputError: `out` holds files already.
    """
    check_empty(out)
    with emptied_on_error(out):
        return _export(policy, out)


def _export(policy: Policy, out: Path) -> Parity:
    inputs = noise_inputs(policy)
    function, weights = portable_function(policy, inputs[0])
    named = [_named(each) for each in inputs]
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights, named[0]))
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*specs)
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / FUNCTION, bytes(exported.serialize()))
    host = ((name, np.asarray(value)) for name, value in weights.items())
    write_file(out / WEIGHTS, host, lambda: {"format": "np"})
    own = chunks_of(policy, inputs)
    again = jax.jit(jax.export.deserialize(bytearray((out / FUNCTION).read_bytes())).call)
    parity = parity_of(
        policy, own, np.concatenate([np.asarray(again(weights, each)) for each in named])
    )
    _write_example(policy, named, own, out / EXAMPLE)
    shutil.copyfile(Path(__file__).with_name("run_exported.py"), out / PROGRAM)
    write_files(policy.processor, out)
    description = {
        "format": "qvla_jax.stablehlo",
        "version": 1,
        "policy": policy.config.name,
        "function": {
            "file": FUNCTION,
            "platforms": list(exported.platforms),
            "calling_convention_version": exported.calling_convention_version,
            "arguments": "weights by name, inputs by name",
            "holds": _INSIDE,
            "left_to_the_caller_before": _OUTSIDE[0],
            "left_to_the_caller_after": _OUTSIDE[1],
            **({"not_returned": _HISTORY} if policy.observation.has_history else {}),
        },
        "weights": {
            "file": WEIGHTS,
            "bytes": sum(value.nbytes for value in weights.values()),
            "packed_layers": len(packed_layers(policy.model)),
            "packed_embeddings": len(packed_embeddings(policy.model)),
        },
        "inputs": [_described(name, value) for name, value in named[0].items()],
        "output": _described("normalized actions", own[:1]),
        "executed_entries": list(policy.layout.action_entries),
        "statistics": {"unnorm_key": policy.config.unnorm_key, "by_data_set": policy.statistics},
        "config": to_record(policy.config),
        "example": {"file": EXAMPLE, "observations": len(inputs)},
        "parity": to_plain(parity),
        "packages": package_versions(),
    }
    write_json(out / DESCRIPTION, description)
    return parity


def portable_function(
    policy: Policy, inputs: Any
) -> tuple[Callable[..., Float[Array, "b h a"]], dict[str, AnyArray]]:
    """A function of (weights by name, inputs by name), and the weights.

    Args:
        policy: packed or not.
        inputs: prepared; of the same structure as those of all calls.
    """
    model = nnx.merge(*nnx.split(policy.model))
    layers = packed_layers(model)
    replace_modules(model, {path: _portable(layer) for path, layer in layers.items()})
    separate_attention(model)
    graphdef, state = nnx.split(model)
    held = {"model": state, "conditioning": policy.conditioning}
    paths, structure = jax.tree.flatten_with_path(held)
    weights = {_name(path): value for path, value in paths}
    input_names, input_structure = list(_named(inputs)), jax.tree.structure(inputs)

    def actions(weights: dict[str, Array], inputs: dict[str, Array]) -> Float[Array, "b h a"]:
        restored = jax.tree.unflatten(structure, [weights[_name(path)] for path, _ in paths])
        prepared = jax.tree.unflatten(input_structure, [inputs[name] for name in input_names])
        with jax.default_matmul_precision("float32"):
            network = nnx.merge(graphdef, restored["model"])
            return network.actions(prepared, restored["conditioning"])

    return actions, weights


def _portable(layer: PackedLinear) -> PackedLinear:
    weight, inputs = layer.weight, layer.inputs
    return PackedLinear(
        weight,
        activation_bits=inputs.activation_bits,
        input_scale=inputs.scale,
        rotated=inputs.rotated,
        joined=PackedArrays(portable.prepare(weight)),
    )


def _named(inputs: Any) -> dict[str, np.ndarray]:
    """Arrays of prepared inputs by name."""
    return {_name(path): np.asarray(value) for path, value in jax.tree.leaves_with_path(inputs)}


def _name(path: tuple[Any, ...]) -> str:
    keys = (next(getattr(k, a) for a in ("key", "name", "idx") if hasattr(k, a)) for k in path)
    return path_string(tuple(keys)) or "inputs"


def _described(name: str, value: np.ndarray) -> dict[str, Any]:
    return {"name": name, "shape": list(value.shape), "dtype": value.dtype.name}


def _write_example(
    policy: Policy, inputs: list[dict[str, np.ndarray]], chunks: np.ndarray, path: Path
) -> None:
    """Inputs, the observations that they were made from, and actions before and after scaling."""
    arrays: dict[str, Any] = {"actions": chunks}
    robot = []
    for number, each in enumerate(inputs):
        observation = policy.fake_observation(number)
        arrays |= {f"{number}.{name}": value for name, value in each.items()}
        arrays |= {f"{number}.observation.{k}": np.asarray(v) for k, v in observation.items()}
        state = observation["state"][None] if "state" in observation else None
        robot.append(policy.unnormalize_actions(chunks[number : number + 1], state))
    content = io.BytesIO()
    np.savez_compressed(content, **arrays, robot_actions=np.concatenate(robot))
    write_bytes(path, content.getvalue())
