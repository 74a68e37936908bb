"""Latency of one action chunk, packed against full precision: one observation at a time.

    python benchmarks/latency.py --model libero-mini --file runs/mini/policy.qvla

The policies answer the same observations in turn, so that other work on the machine meets all. The
packed one is also run with every layer apart, instead of one call for layers that take one input.
Times are of `Policy.run`, from the prepared observation to the actions.
"""

import argparse
import os

import numpy as np

import qvla_jax
from qvla_jax.evaluation.latency import chunk_seconds, summarize_seconds
from qvla_jax.inference import Policy
from qvla_jax.inference.packed_linear import PackedLinear, packed_layers
from qvla_jax.kernels import cpu
from qvla_jax.models import replace_modules


def main() -> None:
    """Prints median and 95th percentile of both, and how far their actions are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="libero-mini")
    parser.add_argument("--file", required=True, help="a .qvla file made of the model")
    parser.add_argument("--frames", type=int, default=200)
    arguments = parser.parse_args()
    policies = {
        "full precision": qvla_jax.load_policy(arguments.model),
        "packed": qvla_jax.load_policy(arguments.file),
        "packed, layers apart": apart(qvla_jax.load_policy(arguments.file)),
    }
    frames = qvla_jax.calibration_set("bundled", frames=arguments.frames, split="heldout")
    observations = list(frames.batches(1))
    seconds = chunk_seconds(policies, observations)
    full, packed = (
        np.concatenate([policy.run(policy.prepare(batch)) for batch in observations])
        for policy in list(policies.values())[:2]
    )
    difference = float(np.abs(full - packed).max())
    print(f"kernel {cpu.instruction_set()}, load {os.getloadavg()[0]:.1f}")
    for name, values in seconds.items():
        found = summarize_seconds(values)
        print(f"{name}: median {found.median_ms:.1f} ms, 95th percentile {found.p95_ms:.1f} ms")
    print(f"largest difference of a normalized action between the first two: {difference:.2g}")
    together, alone = (np.asarray(seconds[name]) for name in list(seconds)[1:])
    print(f"time of packed over packed, layers apart: median {np.median(together / alone):.3f}")


def apart(policy: Policy) -> Policy:
    """The same policy with a weight of its own in every layer."""
    layers = {
        name: PackedLinear(layer.weight) for name, layer in packed_layers(policy.model).items()
    }
    replace_modules(policy.model, layers)
    return policy


if __name__ == "__main__":
    main()
