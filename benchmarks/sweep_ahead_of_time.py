"""Compiles the first-order sweep step at full size for accelerators that are not there.

    pip install 'qvla-jax[aot-tpu]'
    python benchmarks/sweep_ahead_of_time.py v5e-256 v6e-8
    pip install 'qvla-jax[aot-gpu]'
    python benchmarks/sweep_ahead_of_time.py h100

The step is what `sensitivities(method="jacobian")` runs for each batch, compiled by the compiler
that would do so beside the device: memory and operations are the compiled program's own. That shows
that the step lowers and fits. The time of a whole sweep is an estimate, operations over the
published peak rate, and says nothing of the speed that would be reached.

`--by-stage` compiles one program for each kind of stage instead (a transformer block, a patch
embedding, a projector), as a sweep runs them whose weights visit the device a stage at a time: in
minutes where the whole step takes hours. What lies between stages (embeddings, norms, the head) is
left out. Operations are summed over all stages of a kind; a compiler for GPUs does not count them,
and there the matrix products of the traced program are counted instead.
"""

import argparse
import collections
import dataclasses
import os
import sys
import time
from typing import Any, Final

# The compiler must not look for the host of a TPU nor lock one, nor JAX look for an accelerator.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from operations import operations_of

from qvla_jax import sharding
from qvla_jax.families.layout import Layout
from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.families.prismatic.network import abstract_model
from qvla_jax.families.prismatic.specs import inputs_spec
from qvla_jax.quantization.layers import quantizable_layers
from qvla_jax.sensitivity.instrument import side_by_side
from qvla_jax.sensitivity.jacobian import CONTRACTIONS, constant_specs
from qvla_jax.sensitivity.reverse import Probed, ReverseSpec, reverse_sweep, sum_in_blocks
from qvla_jax.sensitivity.stages import stage_paths, wrap_stages
from qvla_jax.sensitivity.streaming import StaticStage, pull_back_stage, split_stage

# What XLA asks of a GPU that it compiles for; from the data sheet of the H100 SXM.
_H100: Final = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices, how the mesh lies on them, and what is published of one of them."""

    platform: str
    topology: str
    channel: int
    # Options in one pass: their rows' changes have to fit.
    options: int
    memory_gib: int
    # Dense bfloat16, operations per second.
    peak: float
    settings: dict[str, str] = dataclasses.field(default_factory=dict)


TARGETS: Final = {
    "v5e-256": Target("tpu", "v5e:16x16", 8, 4, 16, 197e12),
    "v6e-8": Target("tpu", "v6e:2x4", 8, 4, 32, 918e12),
    "h100": Target("cuda", "h100", 1, 1, 80, 989e12, {"target_config": _H100, "topology": "1x1x1"}),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """What the compiler says of one step, for one device."""

    devices: int
    frames: int
    arguments: int
    temporary: int
    # None where the compiler does not count them.
    operations: float | None
    compile_seconds: float


def main() -> int:
    """Prints a table; returns 1 if something does not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--preset", default="openvla-oft-7b")
    parser.add_argument("--frames", type=int, default=1, help="on each device along data")
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--sweep-frames", type=int, default=128, help="of the estimate")
    parser.add_argument("--by-stage", action="store_true", help="one program for each kind")
    arguments = parser.parse_args()
    if arguments.by_stage:
        return by_stage(arguments)
    print(
        "| target | data x channel | options | arguments | temporary | memory of a device "
        "| operations of a device | estimated sweep |\n" + "|---" * 8 + "|"
    )
    failed = False
    for name in arguments.targets:
        target = TARGETS[name]
        try:
            step = compile_step(target, arguments.preset, arguments.frames, arguments.probes)
        except Exception as error:  # whatever the compiler raises
            print(f"| {name} | does not compile: {' '.join(str(error).split())[:600]} |")
            failed = True
            continue
        operations = estimate = "-"
        if step.operations is not None:
            steps = -(-arguments.sweep_frames // step.frames) * -(-4 // target.options)
            operations = f"{step.operations / 1e12:.3g} T"
            estimate = f"{steps * step.operations / target.peak:.3g} s"
        print(
            f"| {name} | {step.devices // target.channel} x {target.channel} | {target.options} "
            f"| {step.arguments / 2**30:.2f} GiB | {step.temporary / 2**30:.2f} GiB "
            f"| {target.memory_gib} GiB | {operations} | {estimate} |",
            flush=True,
        )
        print(f"{name}: compiled in {step.compile_seconds:.0f} s", file=sys.stderr)
    return int(failed)


def by_stage(arguments: argparse.Namespace) -> int:
    """Prints a table of the kinds of stages for each target."""
    print(
        "| target | stage | of its kind | arguments | temporary | operations of a device, all of "
        "its kind |\n" + "|---" * 6 + "|"
    )
    for name in arguments.targets:
        target = TARGETS[name]
        mesh = mesh_of(target)
        frames = arguments.frames * mesh.shape[sharding.DATA_AXIS]
        model = abstract_model(preset(arguments.preset), dtype=jnp.bfloat16)
        inputs = inputs_spec(preset(arguments.preset), batch_size=frames)
        total, weights, seconds = 0.0, 0, time.perf_counter()
        found = kinds_of_stages(model, layout(preset(arguments.preset)), inputs)
        for path, count, kind in found:
            if not kind.layers:
                continue
            traced = trace_stage(kind, mesh, target.options, frames, arguments.probes)
            compiled = traced.lower().compile()
            memory = compiled.memory_analysis()
            counted = operations_of(traced.jaxpr.jaxpr) / mesh.size
            operations = count * (compiled.cost_analysis() or {}).get("flops", counted)
            total += operations
            weights += count * sum(
                leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kind.state)
            )
            print(
                f"| {name} | `{path}` | {count} | {memory.argument_size_in_bytes / 2**30:.3f} GiB "
                f"| {memory.temp_size_in_bytes / 2**30:.3f} GiB | {operations / 1e12:.3g} T |",
                flush=True,
            )
        steps = -(-arguments.sweep_frames // frames) * -(-4 // target.options)
        share = weights / target.channel / 2**30
        print(
            f"{name}: {mesh.shape[sharding.DATA_AXIS]} x {target.channel} devices, {frames} frames "
            f"in a step; weights of all stages {share:.2f} GiB on each; {total / 1e12:.3g} T "
            f"for a step, estimated sweep of {arguments.sweep_frames} frames "
            f"{steps * total / target.peak:.3g} s at the published peak; compiled in "
            f"{time.perf_counter() - seconds:.0f} s"
        )
    return 0


def mesh_of(target: Target) -> Mesh:
    """The mesh on the target's topology."""
    topology = topologies.get_topology_desc(
        platform=target.platform, topology_name=target.topology, **target.settings
    )
    devices = np.asarray(topology.devices).reshape(-1, target.channel)
    return Mesh(devices, (sharding.DATA_AXIS, sharding.CHANNEL_AXIS))


@dataclasses.dataclass(frozen=True)
class Kind:
    """Stages that share a program."""

    stage: StaticStage
    state: Any
    fixed: list[Any]
    values: list[Any]
    output: jax.ShapeDtypeStruct
    # Layers inside, with their numbers of outputs and inputs.
    layers: tuple[tuple[str, int, int], ...]


def kinds_of_stages(model: Any, own: Layout, inputs: Any) -> list[tuple[str, int, Kind]]:
    """The first stage of each kind that the forward pass calls, and how many calls there are."""
    widths = {
        path: (layer.out_features, layer.in_features)
        for path, layer in quantizable_layers(model, own.rules).items()
    }
    graphdef, state = nnx.split(model)
    counts: collections.Counter[str] = collections.Counter()
    first: dict[str, tuple[str, Kind]] = {}

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def call(path: str, inner: Any, *args: Any) -> Any:
        stage, own, fixed, values = split_stage(inner, args)
        output = inner(*args)
        layers = tuple(
            (p.removeprefix(f"{path}."), *width)
            for p, width in widths.items()
            if p.startswith(f"{path}.")
        )
        kind = Kind(stage, *(shapes(x) for x in (own, fixed, values, output)), layers)
        key = f"{stage} {kind.state} {kind.values} {layers}"
        counts[key] += 1
        first.setdefault(key, (path, kind))
        return output

    def run(state: Any, inputs: Any) -> Any:
        copy = nnx.merge(graphdef, state)
        wrap_stages(copy, stage_paths(copy, own), call)
        return copy(inputs)

    jax.eval_shape(run, state, inputs)
    return [(path, counts[key], kind) for key, (path, kind) in first.items()]


def trace_stage(kind: Kind, mesh: Mesh, options: int, frames: int, probes: int) -> Any:
    """The way back through one stage for all probes, and its layers' contraction."""

    def step(
        state: Any, constants: Any, fixed: list[Any], values: list[Any], cotangents: Any
    ) -> Any:
        names = tuple(name for name, *_ in kind.layers)
        seen, at_outputs, at_inputs = pull_back_stage(
            kind.stage, names, state, fixed, values, cotangents
        )
        costs = {}
        for name, x in seen.items():
            of_cotangent = CONTRACTIONS["jacobian"](side_by_side(x, frames), constants[name])
            costs[name] = sum_in_blocks(
                lambda calls, of=of_cotangent: of(side_by_side(calls, frames)),
                at_outputs[name],
                probes,
            )
        return costs, at_inputs

    def placed(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def by_frame(leaf: Any) -> jax.ShapeDtypeStruct:
        # Images of a frame lie side by side; what has no axis of frames is the same for all.
        whole = leaf.ndim and leaf.shape[0] % frames == 0 and leaf.shape[0] >= frames
        return placed(leaf, PartitionSpec(sharding.DATA_AXIS) if whole else PartitionSpec())

    def by_weight(leaf: Any) -> jax.ShapeDtypeStruct:
        return placed(leaf, sharding.largest_axis(mesh, leaf.shape))

    constants = {
        name: {
            "changes": placed(
                jax.ShapeDtypeStruct((options, outputs, inputs), jnp.bfloat16),
                constant_specs(mesh, outputs)["changes"],
            ),
            "mean": placed(jax.ShapeDtypeStruct((inputs,), jnp.float32), PartitionSpec()),
        }
        for name, outputs, inputs in kind.layers
    }
    cotangents = jax.ShapeDtypeStruct((probes, *kind.output.shape), kind.output.dtype)
    return jax.jit(step).trace(
        jax.tree.map(
            lambda leaf: placed(leaf, sharding.largest_axis(mesh, leaf.shape)), kind.state
        ),
        constants,
        jax.tree.map(by_frame, kind.fixed),
        jax.tree.map(by_frame, kind.values),
        placed(cotangents, PartitionSpec(None, sharding.DATA_AXIS)),
    )


def compile_step(target: Target, name: str, frames: int, probes: int) -> Step:
    """Lowers and compiles the step for a target."""
    mesh = mesh_of(target)
    model = abstract_model(preset(name), dtype=jnp.bfloat16)
    layers = quantizable_layers(model, layout(preset(name)).rules)
    graphdef, state = nnx.split(model)
    batch = frames * mesh.shape[sharding.DATA_AXIS]

    def placed(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    constants = {}
    for path, layer in layers.items():
        specs = constant_specs(mesh, layer.out_features)
        shape = (target.options, layer.out_features, layer.in_features)
        constants[path] = {
            "changes": placed(jax.ShapeDtypeStruct(shape, jnp.bfloat16), specs["changes"]),
            "mean": placed(jax.ShapeDtypeStruct(shape[2:], jnp.float32), specs["mean"]),
        }
    split = PartitionSpec(sharding.DATA_AXIS)
    spec = ReverseSpec(graphdef, tuple(layers), CONTRACTIONS["jacobian"], probes, mesh)
    started = time.perf_counter()
    compiled = reverse_sweep.lower(
        spec,
        jax.tree.map(lambda leaf: placed(leaf, sharding.largest_axis(mesh, leaf.shape)), state),
        constants,
        Probed(
            inputs=jax.tree.map(
                lambda leaf: placed(leaf, split), inputs_spec(preset(name), batch_size=batch)
            ),
            frames=placed(jax.ShapeDtypeStruct((batch,), jnp.int32), split),
            key=placed(jax.eval_shape(lambda: jax.random.key(0)), PartitionSpec()),
        ),
    ).compile()
    memory = compiled.memory_analysis()
    return Step(
        devices=mesh.size,
        frames=batch,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        operations=(compiled.cost_analysis() or {}).get("flops"),
        compile_seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    sys.exit(main())
