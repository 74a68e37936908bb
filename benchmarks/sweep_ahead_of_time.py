"""Compiles the first-order sweep step at full size for accelerators that are not there.

    pip install 'qvla-jax[aot-tpu]'
    python benchmarks/sweep_ahead_of_time.py v5e-256 v6e-8
    pip install 'qvla-jax[aot-gpu]'
    python benchmarks/sweep_ahead_of_time.py h100

The step is what `sensitivities(method="jacobian")` runs for each batch, compiled by the compiler
that would do so beside the device: memory and operations are the compiled program's own. That shows
that the step lowers and fits. The time of a whole sweep is an estimate, operations over the
published peak rate, and says nothing of the speed that would be reached.
"""

import argparse
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

from qvla_jax import sharding
from qvla_jax.config import preset
from qvla_jax.inference.specs import inputs_spec
from qvla_jax.models import abstract_model
from qvla_jax.quantization.layers import quantizable_layers
from qvla_jax.sensitivity.jacobian import CONTRACTIONS, constant_specs
from qvla_jax.sensitivity.reverse import ReverseSpec, reverse_sweep

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
    arguments = parser.parse_args()
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


def compile_step(target: Target, name: str, frames: int, probes: int) -> Step:
    """Lowers and compiles the step for a target."""
    topology = topologies.get_topology_desc(
        platform=target.platform, topology_name=target.topology, **target.settings
    )
    devices = np.asarray(topology.devices).reshape(-1, target.channel)
    mesh = Mesh(devices, (sharding.DATA_AXIS, sharding.CHANNEL_AXIS))
    model = abstract_model(preset(name), dtype=jnp.bfloat16)
    layers = quantizable_layers(model)
    graphdef, state = nnx.split(model)
    batch = frames * len(devices)

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
        jax.tree.map(lambda leaf: placed(leaf, split), inputs_spec(preset(name), batch_size=batch)),
        placed(jax.ShapeDtypeStruct((batch,), jnp.int32), split),
        placed(jax.eval_shape(lambda: jax.random.key(0)), PartitionSpec()),
        None,
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
