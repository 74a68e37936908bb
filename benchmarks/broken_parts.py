"""What breaks a quantized policy: its action error, part by part and cause by cause.

    python benchmarks/broken_parts.py runs/study/methods/action-aware-w1.qvla --model libero-mini

Each row of the table is the full-precision policy with some rows of the file: those of one part
(layers of one kind in one tower or in the language model), all but those, only the pruned ones, or
only the rounded ones. Errors are those of `qvla evaluate`, on held-out frames.
"""

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.data.calibration import calibration_set
from qvla_jax.evaluation.offline import PreparedFrames
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.comparable import comparable
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.models.surgery import named_modules
from qvla_jax.quantization.codes import PRUNED, SOURCE


def part_of(policy: Policy, path: str) -> str:
    """The layers of one kind of block, at any depth."""
    return policy.layout.module_type(path).rpartition(".")[0]


def with_rows(policy: Policy, quantized: Policy, chosen: dict[str, np.ndarray]) -> Policy:
    """The policy with the chosen rows, and their biases, of a quantized one.

    Args:
        policy: full precision.
        quantized: `comparable`, in ordinary layers.
        chosen: path -> bool[c]; other layers keep the policy's rows.
    """
    model = nnx.merge(*nnx.split(comparable(policy).model))
    mine, other = named_modules(model, nnx.Linear), named_modules(quantized.model, nnx.Linear)
    for path, rows in chosen.items():
        layer, taken = mine[path], other[path]
        kernel = layer.kernel[...].astype(jnp.float32)
        layer.kernel = nnx.Param(jnp.where(rows[None], taken.kernel[...], kernel))
        layer.bias = nnx.Param(jnp.where(rows, taken.bias[...], layer.bias[...]))
    for path in other.keys() & mine.keys() - chosen.keys():
        # One compiled program serves all mixtures.
        layer, kind = mine[path], other[path].kernel[...].dtype
        layer.kernel = nnx.Param(layer.kernel[...].astype(kind))
    return dataclasses.replace(policy, model=model)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="packed policy, with unrounded activations")
    parser.add_argument("--model", default="libero-mini", help="what the file was made from")
    parser.add_argument("--frames", type=int, default=128, help="held-out frames")
    arguments = parser.parse_args()
    policy = load_policy(arguments.model)
    packed = load_policy(str(arguments.file))
    quantized = comparable(unpacked(policy, packed))
    bits = {path: layer.weight.bits() for path, layer in packed_layers(packed.model).items()}
    fan_in = {path: layer.weight.shape[1] for path, layer in packed_layers(packed.model).items()}
    heldout = calibration_set(
        "bundled", frames=arguments.frames, split="heldout", horizon=policy.config.action_horizon
    )
    frames = PreparedFrames.of(policy, heldout)
    reference = frames.predict(comparable(policy)).chunks

    def row(name: str, chosen: dict[str, np.ndarray]) -> None:
        errors = frames.predict(with_rows(policy, quantized, chosen)).errors(reference)
        weights = {path: rows.sum() * fan_in[path] for path, rows in chosen.items()}
        total = max(sum(weights.values()), 1)
        pruned, average = (
            sum(np.sum(of(bits[p])[r]) * fan_in[p] for p, r in chosen.items()) / total
            for of in (lambda b: b == PRUNED, lambda b: b)
        )
        print(
            f"| {name} | {total / 1e6:.2f} | {average:.2f} | {pruned:.0%} "
            f"| {errors.action_mse_normalized:.2g} | {errors.action_mse_median_normalized:.2g} "
            f"| {errors.mse_by_dimension[-1]:.2g} | {errors.gripper_flip_rate:.2%} |",
            flush=True,
        )

    print(
        "| rows of the file | million weights | bits | pruned | mean | median | gripper | flips |"
    )
    print("|---|---|---|---|---|---|---|---|")
    all_rows = {path: np.ones(len(own), bool) for path, own in bits.items()}
    row("all", all_rows)
    row("pruned", {path: own == PRUNED for path, own in bits.items()})
    rounded = {path: (own != PRUNED) & (own != SOURCE) for path, own in bits.items()}
    row("rounded", rounded)
    for part in dict.fromkeys(part_of(policy, path) for path in bits):
        inside = {p: rows for p, rows in all_rows.items() if part_of(policy, p) == part}
        row(part, inside)
        row(f"all but {part}", {p: rows for p, rows in all_rows.items() if p not in inside})


if __name__ == "__main__":
    main()
