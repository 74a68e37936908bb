"""Latency of one action chunk, packed against full precision: one observation at a time.

    python benchmarks/latency.py --model libero-mini --file runs/mini/policy.qvla

Both policies answer the same observations in turn, so that other work on the machine meets both.
Times are of `Policy.run`, from the prepared observation to the actions.
"""

import argparse
import os
import time

import numpy as np

import qvla_jax
from qvla_jax.kernels import cpu


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
    }
    frames = qvla_jax.calibration_set("bundled", frames=arguments.frames, split="heldout")
    times: dict[str, list[float]] = {name: [] for name in policies}
    apart = 0.0
    for number, batch in enumerate(frames.batches(1)):
        answers = []
        for name, policy in policies.items():
            inputs = policy.prepare(batch)
            start = time.perf_counter()
            answers.append(policy.run(inputs))
            if number >= 5:  # the first ones compile
                times[name].append(1e3 * (time.perf_counter() - start))
        apart = max(apart, float(np.abs(answers[0] - answers[1]).max()))
    print(f"kernel {cpu.instruction_set()}, load {os.getloadavg()[0]:.1f}")
    for name, values in times.items():
        median, high = np.percentile(values, [50, 95])
        print(f"{name}: median {median:.1f} ms, 95th percentile {high:.1f} ms")
    print(f"largest difference of a normalized action between the two: {apart:.2g}")


if __name__ == "__main__":
    main()
