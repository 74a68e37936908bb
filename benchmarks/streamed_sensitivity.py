"""First-order sensitivities of a policy whose weights stay in their files: time, rate, memory.

    qvla synthesize --preset openvla-oft-7b --out synthetic
    python benchmarks/streamed_sensitivity.py synthetic

Runs what `qvla sensitivity --streamed` runs, on bundled frames, batch after batch: the pass that
measures the inputs' means, then the sweep. The sweep's first batch also searches the grid of every
row, which later ones know; that is timed apart. Operations are those of the matrix products that
run, counted in the traced functions. The rate is compared with that of one large float32 product on
the same threads, timed before and after. Exact probing, one forward pass for each channel and
option, is counted and not run: its time is its operations at the sweep's rate.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from operations import largest_rate, product_operations

from qvla_jax.array_typing import Array
from qvla_jax.data.calibration import calibration_set
from qvla_jax.devices import use_all_cpu_cores
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.quantize import policy_layers
from qvla_jax.quantization import Quantizer, QuantizerSettings
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.layers import channel_index
from qvla_jax.sensitivity.accumulate import FrameMean
from qvla_jax.sensitivity.instrument import hooked_call
from qvla_jax.sensitivity.jacobian import CONTRACTIONS, streamed_frame_costs
from qvla_jax.sensitivity.reverse import Probed, ReverseSpec, reverse_sweep
from qvla_jax.sensitivity.statistics import streamed_means
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.sharding import one_device_mesh

BITS = (0, 2, 4, 8)


class TimedQuantizer(Quantizer):
    """Sums up the time of the search that only the first batch makes."""

    search = 0.0

    def clips(self, weight: Any, options: tuple[int, ...]) -> dict[int, Array]:
        """See `Quantizer.clips`."""
        jax.block_until_ready(weight)
        started = time.perf_counter()
        found = jax.block_until_ready(super().clips(weight, options))
        self.search += time.perf_counter() - started
        return found


def whole_search(layers: dict[str, Any], index: ChannelIndex) -> float:
    """Seconds that the search of all grids takes, extrapolated from the largest layer."""
    layer = max(index.layers, key=lambda layer: layer.out_features * layer.fan_in)
    weight = jnp.asarray(layers[layer.path].kernel[...].T)
    quantizer = TimedQuantizer(QuantizerSettings(rounding="nearest", bias_correction=False))
    for _ in range(2):  # the first one compiles
        quantizer.search = 0.0
        quantizer.clips(weight, BITS)
    return quantizer.search * index.num_weights / weight.size


def operations(policy: Policy, index: ChannelIndex, inputs: Any, probes: int) -> tuple[int, int]:
    """Of one forward pass, and of the sweep of one batch with what streaming runs again."""
    graphdef, state = nnx.split(policy.model)
    state, inputs = jax.eval_shape(lambda tree: tree, (state, inputs))

    def forward(state: Any, inputs: Any) -> Array:
        return hooked_call(graphdef, state, (inputs,), (), lambda path, x, y: y)

    spec = ReverseSpec(graphdef, index.paths, CONTRACTIONS["jacobian"], probes, one_device_mesh())
    constants = {
        layer.path: {
            "changes": jax.ShapeDtypeStruct(
                (len(BITS), layer.out_features, layer.fan_in), np.float32
            ),
            "mean": jax.ShapeDtypeStruct((layer.fan_in,), np.float32),
        }
        for layer in index.layers
    }
    frames = jax.ShapeDtypeStruct((len(jax.tree.leaves(inputs)[0]),), np.int32)

    def sweep(state: Any, constants: Any, inputs: Any, frames: Any) -> Any:
        probed = Probed(inputs, frames, jax.random.key(0))
        return reverse_sweep(spec, state, constants, probed)

    once = product_operations(forward, state, inputs)
    return once, once + product_operations(sweep, state, constants, inputs, frames)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="a public one")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="frames of each")
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument(
        "--grid", choices=("fitted", "rtn"), default="fitted",
        help="rtn needs no search, which is then extrapolated from one layer",
    )  # fmt: skip
    arguments = parser.parse_args()
    use_all_cpu_cores()
    before = largest_rate()
    started = time.perf_counter()
    policy = load_policy(arguments.directory, mapped=True)
    layers = policy_layers(policy)
    index = channel_index(layers)
    rows = [("opening the directory", time.perf_counter() - started, 0)]
    frames = calibration_set(
        frames=arguments.batches * arguments.batch, horizon=policy.config.action_horizon
    )
    inputs = policy.prepare(next(frames.batches(arguments.batch)))
    once, whole = operations(policy, index, inputs, arguments.probes)
    print(f"{len(index):,} channels, {index.num_weights:,} weights; one batch: forward "
          f"{once / 1e12:.2f} TFLOP, sweep {whole / 1e12:.1f} TFLOP", flush=True)  # fmt: skip
    started = time.perf_counter()
    statistics = streamed_means(policy, frames, index, batch=arguments.batch)
    # Forward, forward again, and back for one probe.
    rows.append(("means of the inputs, for all batches", time.perf_counter() - started, 0))
    print(f"means: {rows[-1][1]:.0f} s", flush=True)
    mean, started = FrameMean(), time.perf_counter()
    settings = QuantizerSettings(grid=arguments.grid, rounding="nearest")
    quantizer = TimedQuantizer(settings, statistics)
    sweep = Sweep(
        policy=policy,
        calibration=frames,
        index=index,
        quantizer=quantizer,
        bits=BITS,
        batch=arguments.batch,
    )
    for number, costs in enumerate(streamed_frame_costs(sweep, probes=arguments.probes)):
        took = time.perf_counter() - started
        if number == 0:
            took -= quantizer.search
            found = quantizer.search if arguments.grid == "fitted" else whole_search(layers, index)
            label = "" if arguments.grid == "fitted" else " (extrapolated from one layer)"
            rows.append((f"search of all rows' grids, once{label}", found, 0))
        rows.append((f"sweep, batch {number + 1}, compilation included", took, whole))
        print(f"{rows[-1][0]}: {took:.0f} s", flush=True)
        mean.add(costs)
        started = time.perf_counter()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    best = max(before, largest_rate())
    seconds = rows[-1][1] / arguments.batch
    rate = whole / rows[-1][1]
    print("| | seconds | TFLOP | GFLOP/s |\n|---|---|---|---|")
    for label, took, count in rows:
        done = f"{count / 1e12:.1f} | {count / took / 1e9:,.0f}" if count else "- | -"
        print(f"| {label} | {took:.1f} | {done} |")
    print(f"largest product: {best / 1e9:,.0f} GFLOP/s; the sweep reaches {rate / best:.0%}")
    print(f"seconds for each frame: {seconds:.1f}; peak resident memory {largest:.2f} GiB")
    probing = len(index) * len(BITS) * once / arguments.batch
    print(
        f"exact probing of one frame: {probing / 1e15:,.0f} PFLOP, {probing / rate / 86400:,.0f} "
        f"days at this rate: {probing * arguments.batch / whole:,.0f} times as long"
    )
    print(f"costs: {np.count_nonzero(mean.mean):,} of {mean.mean.size:,} are not zero; "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
