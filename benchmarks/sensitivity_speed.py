"""Sensitivities per second: this library against loops in PyTorch on the same frames.

    pip install 'qvla-jax[parity]'
    python benchmarks/sensitivity_speed.py

A value is one channel at one bit-width. The loops run on a PyTorch twin of the policy with the same
weights, whose actions are compared with the policy's before anything is timed:

(a) perturb one output channel, run the model on all frames, measure the action's change;
(b) the procedure of QVLA's released code: for each layer a pass over all frames that collects the
    layer's input covariance, then its inverse and a proxy for each channel and bit-width.

Times are wall clock, without compilation; (a) and `exact` are timed on channels drawn evenly over
all layers, without quantizing the rows; (b) on layers drawn evenly, and is scaled up. All are timed
in turn, round after round, in one process; the figures are medians over the rounds, of the seconds
and of the ratios within a round.

Last come the operations of a forward pass, the share of them that has to run again for an average
channel, and the rate at which `exact` would have to run them to be five times as fast as (a).
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from operations import largest_rate, product_operations
from torch import nn
from torch_twin import Twin, twin_of

from qvla_jax.data.calibration import calibration_set
from qvla_jax.devices import use_all_cpu_cores
from qvla_jax.families.prismatic.network import ModelInputs
from qvla_jax.inference import load_policy
from qvla_jax.inference.quantize import policy_layers
from qvla_jax.quantization import InputStatistics, Quantizer, QuantizerSettings
from qvla_jax.quantization.layers import channel_index
from qvla_jax.sensitivity import input_statistics
from qvla_jax.sensitivity.accumulate import mean_over_frames
from qvla_jax.sensitivity.batches import FirstFrames
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.input_hessian import inverse_factor_diagonal, proxy_costs
from qvla_jax.sensitivity.jacobian import frame_costs, layer_constants
from qvla_jax.sensitivity.replay import ReplaySpec, order_of, record
from qvla_jax.sensitivity.stages import downstream, part_paths
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.sharding import one_device_mesh

BITS = (0, 2, 4, 8)


class Prepared(Quantizer):
    """Quantizes a layer once, so that a timed call finds it done."""

    def __init__(self, settings: QuantizerSettings, statistics: InputStatistics):
        super().__init__(settings, statistics)
        self.known: dict[str, Any] = {}

    def row_changes(self, path: str, *args: Any, **settings: Any) -> Any:
        """See `Quantizer.row_changes`; always asked for the same rows and options here."""
        if path not in self.known:
            self.known[path] = np.asarray(super().row_changes(path, *args, **settings))
        return self.known[path]


def torch_inputs(inputs: ModelInputs) -> tuple[torch.Tensor, ...]:
    """Prepared inputs, as the twin takes them."""
    arrays = (inputs.images, inputs.input_ids, inputs.prompt_length, inputs.proprio)
    return tuple(torch.from_numpy(np.array(a)) for a in arrays)


def seconds(function: Callable[[], Any]) -> float:
    """Wall clock of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@torch.inference_mode()
def perturb(twin: Twin, path: str, channel: int, row: np.ndarray, inputs: Any, base: Any) -> float:
    """Loop (a), one turn: replace a row, run, put it back."""
    weight = twin.get_submodule(path).weight
    source = weight[channel].clone()
    weight[channel] = torch.from_numpy(row)
    change = twin(*inputs) - base
    weight[channel] = source
    return float(change.double().square().sum(dim=(1, 2)).mean())


@torch.inference_mode()
def released_proxy(twin: Twin, path: str, batches: list[Any]) -> np.ndarray:
    """Loop (b), one layer: a pass over all frames, the inverse covariance, all channels."""
    layer = twin.get_submodule(path)
    total = torch.zeros(layer.in_features, layer.in_features)

    def collect(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].reshape(-1, layer.in_features)
        total.addmm_(x.T, x)

    handle = layer.register_forward_pre_hook(collect)
    for batch in batches:
        twin(*batch)
    handle.remove()
    frames = sum(len(batch[0]) for batch in batches)
    diagonal = inverse_factor_diagonal(2.0 / frames * total.numpy())
    return proxy_costs(layer.weight.numpy(), diagonal, BITS)


def forward_operations(policy: Any, layers: dict[str, Any], inputs: Any) -> tuple[int, float]:
    """Of a batch, and which share of the layers' has to run again, averaged over channels."""
    graphdef, state = nnx.split(policy.model)
    parts = part_paths(policy.model, policy.layout, tuple(layers))
    spec = ReplaySpec(graphdef, tuple(layers), parts, one_device_mesh())
    order = order_of(spec, state, inputs)
    each: dict[tuple[str, int], int] = {}

    def run(state: Any, inputs: Any) -> None:
        for path, calls in record(spec, state, inputs).inputs.items():
            for number, x in enumerate(calls):
                each[path, number] = x.size * layers[path].kernel[...].shape[1]

    jax.eval_shape(run, state, inputs)
    reached = [path for path in layers if (path, 0) in each]
    again = [
        sum(each.get(call, 0) for call in downstream(order, [path], policy.layout))
        for path in reached
    ]
    channels = np.array([layers[path].kernel[...].shape[1] for path in reached])
    once = product_operations(lambda s, x: nnx.merge(graphdef, s)(x), state, inputs)
    return once, float(again @ channels / channels.sum() / sum(each.values()))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="libero-mini")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", type=int, default=90, help="timed by exact")
    parser.add_argument("--turns", type=int, default=24, help="of loop (a)")
    parser.add_argument("--layers", type=int, default=8, help="timed by loop (b)")
    arguments = parser.parse_args()
    use_all_cpu_cores()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    policy = load_policy(arguments.model)
    frames = calibration_set(frames=arguments.frames, horizon=policy.config.action_horizon)
    layers = policy_layers(policy)
    index = channel_index(layers)
    statistics = input_statistics(policy, frames, index)
    quantizer = Quantizer(QuantizerSettings(), statistics)
    prepared = Prepared(QuantizerSettings(), statistics)
    values = len(index) * len(BITS)

    twin = twin_of(policy)
    (whole,) = (torch_inputs(policy.prepare(b)) for b in frames.batches(arguments.frames))
    batches = [torch_inputs(policy.prepare(b)) for b in frames.batches(8)]
    with torch.inference_mode():
        base = twin(*whole)
    expected = policy.infer_normalized(next(iter(frames.batches(arguments.frames))))
    off = float(np.abs(base.numpy() - expected).max())
    print(f"largest difference between the twin's actions and the policy's: {off:.1e}")
    if off > 1e-3:
        raise SystemExit("the twin is not the policy's twin")

    few = FirstFrames(frames, min(8, frames.frames))

    def first_order(of: Any, probes: Any) -> None:
        constants = layer_constants(layers, quantizer, BITS)
        sweep = Sweep(policy=policy, calibration=of, index=index)
        mean_over_frames(frame_costs(sweep, constants, probes=probes))

    # Neighbours, as in a whole sweep: what perturbs one layer is replayed together.
    run_length = 15
    starts = np.linspace(0, len(index) - run_length, arguments.channels // run_length).astype(int)
    rows = np.unique(starts[:, None] + np.arange(run_length)[None])

    def exact(of: Any) -> None:
        sweep = Sweep(policy=policy, calibration=of, index=index, quantizer=prepared, bits=BITS)
        exact_costs(sweep, rows=rows)

    turns = np.linspace(0, len(index) - 1, arguments.turns).astype(int)
    changed = {}
    for row in turns:
        path, channel = index.paths[index.layer_of[row]], int(index.channel[row])
        weight = layers[path].kernel[...].T
        change = np.asarray(quantizer.row_changes(path, weight, (4,)))[0, channel]
        changed[path, channel] = np.asarray(weight[channel]) + change

    def one_by_one() -> None:
        for (path, channel), row in changed.items():
            perturb(twin, path, channel, row, whole, base)

    chosen = [
        index.layers[i] for i in np.linspace(0, len(index.layers) - 1, arguments.layers, dtype=int)
    ]

    def proxies() -> None:
        for layer in chosen:
            released_proxy(twin, layer.path, batches)

    # What is timed: its name, the values that it gives, and which share of the work is done.
    timed: list[tuple[str, int, float, Callable[[], Any]]] = [
        ("(a) PyTorch, one channel at a time", len(changed), 1, one_by_one),
        (
            f"(b) the release's proxy, {len(index.layers)} passes", values,
            len(chosen) / len(index.layers), proxies,
        ),
        ("exact", len(rows) * len(BITS), 1, lambda: exact(frames)),
        ("jacobian, all probes", values, 1, lambda: first_order(frames, "full")),
        ("jacobian, 8 probes", values, 1, lambda: first_order(frames, 8)),
    ]  # fmt: skip
    one_by_one()
    released_proxy(twin, chosen[0].path, batches)
    exact(few)  # compiles, as the next ones do
    first_order(few, "full")
    first_order(few, 8)
    took = np.array(
        [
            [seconds(run) / share for _, _, share, run in timed]
            for _ in range(arguments.rounds)
        ]
    )  # fmt: skip
    rates = np.array([count for _, count, *_ in timed]) / took
    print("| | values | seconds | values per second | over (a) | over (b) |\n" + "|---" * 6 + "|")
    for number, (label, count, *_) in enumerate(timed):
        ratios = (np.median(rates[:, number] / rates[:, loop]) for loop in (0, 1))
        print(
            f"| {label} | {count:,} | {np.median(took[:, number]):.1f} "
            f"| {np.median(rates[:, number]):,.1f} | {next(ratios):,.1f} | {next(ratios):,.2f} |"
        )
    print(f"seconds, round by round: {np.round(took, 1).tolist()}")
    once, again = forward_operations(policy, layers, policy.prepare(next(frames.batches(1))))
    wanted = 5 * np.median(rates[:, 0]) * arguments.frames * once * again
    print(
        f"a forward pass takes {once / 1e9:.2f} GFLOP a frame, of whose layers {again:.0%} run "
        f"again for an average channel; 5 times (a) takes {wanted / 1e9:,.0f} GFLOP/s, "
        f"and one large product reaches {largest_rate() / 1e9:,.0f}"
    )
    load, devices = os.getloadavg()[0], jax.local_device_count()
    print(f"{arguments.frames} frames, {devices} devices, load {load:.1f}")


if __name__ == "__main__":
    main()
