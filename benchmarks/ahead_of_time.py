"""Compiles the packed product for accelerators that are not there.

    pip install 'qvla-jax[aot-tpu]' && python benchmarks/ahead_of_time.py v5e v5p v6e
    pip install 'qvla-jax[aot-gpu]' && python benchmarks/ahead_of_time.py h100 a100

Every line is one product, compiled for one chip by the compiler that would do so beside it, or,
for TPUs, sharded over the four chips of a host: memory is that of one chip. That shows that the
kernel lowers and fits; it says nothing of its speed.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Final
from unittest import mock

# The compiler must not look for the host of a TPU, nor JAX for an accelerator.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from qvla_jax import kernels
from qvla_jax.kernels import sharded
from qvla_jax.kernels.codes import num_words
from qvla_jax.kernels.packed import PackedWeight, Segment
from qvla_jax.quantization.codes import SOURCE_CODES, CodeMap, code_map

# Name -> topology that has such a chip.
TPUS: Final = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# What the compiler asks about a GPU; from NVIDIA's data sheets.
GPU: Final = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} }}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {block_memory}
  shared_memory_per_core: {core_memory} l2_cache_size: {cache}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
GPUS: Final[dict[str, dict[str, Any]]] = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3", "major": 9, "cores": 132, "units": 128, "clock": 1.98,
        "block_memory": 232448, "core_memory": 233472, "cache": 50 << 20,
        "bandwidth": 3352320000000, "memory": 80 << 30,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB", "major": 8, "cores": 108, "units": 64, "clock": 1.41,
        "block_memory": 166912, "core_memory": 167936, "cache": 40 << 20,
        "bandwidth": 2039000000000, "memory": 80 << 30,
    },
    "b200": {
        "name": "NVIDIA B200", "major": 10, "cores": 148, "units": 128, "clock": 1.965,
        "block_memory": 232448, "core_memory": 233472, "cache": 126 << 20,
        "bandwidth": 8000000000000, "memory": 180 << 30,
    },
}  # fmt: skip
MIXED: Final = {16: 0.1, 8: 0.3, 4: 0.4, 2: 0.2}  # 6 bits per weight


def main() -> int:
    """Prints a table; returns 1 if something does not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=[*TPUS, *GPUS])
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 600])
    arguments = parser.parse_args()
    print("| target | weight | rows | activations | arguments | temporary |")
    print("|---|---|---|---|---|---|")
    failed = False
    for target, shape in itertools.product(arguments.targets, arguments.shape):
        chips = devices(target)
        c, k = (int(n) for n in shape.split("x"))
        for (label, w), rows in itertools.product(weights(c, k), arguments.rows):
            for bits, kind in ((16, "bfloat16"), (8, "int8")):
                placed = [(target, on_one(w, target, chips[0]))]
                if target in TPUS:
                    name = f"{target}, {len(chips)} chips"
                    placed.append((name, on_all(w, target, chips)))
                for name, (weight, sharding) in placed:
                    line = compiled(target, weight, sharding, rows, bits)
                    failed |= line.startswith("does not compile")
                    print(f"| {name} | {shape}, {label} | {rows} | {kind} | {line} |", flush=True)
    return int(failed)


def on_one(
    w: PackedWeight, target: str, chip: Any, implementation: str | None = None
) -> tuple[Any, Any]:
    """The arranged weight on one chip, shapes alone, and where its activations are."""
    name = implementation or backend(target)
    prepared = jax.eval_shape(lambda w: kernels.prepare(w, name), w)
    sharding = SingleDeviceSharding(chip)
    return jax.tree.map(lambda a: placed_shape(a, sharding), prepared), sharding


def on_all(w: PackedWeight, target: str, chips: list[Any]) -> tuple[Any, Any]:
    """The weight dealt over all chips, shapes alone, and where its activations are."""
    mesh = Mesh(np.array(chips), ("channel",))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), w)
    zeros = dataclasses.replace(zeros, index=np.arange(w.shape[0], dtype=np.uint16))
    dealt = sharded.arrange(zeros, mesh, "channel", backend(target))
    split, every = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("channel",), ()))
    return dataclasses.replace(
        dealt,
        shards=jax.tree.map(lambda a: placed_shape(a, split), dealt.shards),
        position=placed_shape(dealt.position, every),
        pruned_bias=placed_shape(dealt.pruned_bias, every),
    ), every


def placed_shape(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Shape and place of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def backend(target: str) -> str:
    """The implementation that runs on a target."""
    if target in TPUS:
        return "pallas_tpu"
    older = GPUS[target]["major"] < 9 and jax.__version_info__ < (0, 11)
    return "pallas_triton" if older else "pallas_gpu"


def devices(target: str) -> list[Any]:
    """The chips of a host of TPUs, or one GPU."""
    if target in TPUS:
        found = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    else:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target,
            target_config=GPU.format(**GPUS[target]),
            topology="1x1x1",
        )
    return list(found.devices)


def weights(c: int, k: int) -> Iterator[tuple[str, PackedWeight]]:
    """Shapes of packed weights; no numbers."""
    yield "mixed", shapes(c, k, {bits: round(share * c) for bits, share in MIXED.items()}, None)
    yield "4 bits, groups of 128", shapes(c, k, {4: c}, 128)


def shapes(c: int, k: int, rows: dict[int, int], group: int | None) -> PackedWeight:
    """The arrays of a packed weight with so many rows of each bit-width."""
    groups = 1 if group is None else -(-k // group)

    def meaning(bits: int) -> CodeMap:
        return SOURCE_CODES if bits == 16 else code_map(bits, "fitted")

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    return PackedWeight(
        words=tuple(array(jnp.uint32, n, num_words(k, bits)) for bits, n in rows.items()),
        scales=tuple(
            array(jnp.bfloat16, n, 0 if bits == 16 else groups) for bits, n in rows.items()
        ),
        index=array(jnp.uint16, sum(rows.values())),
        bias=None,
        segments=tuple(Segment(bits, n, meaning(bits)) for bits, n in rows.items()),
        shape=(c, k),
        group=group,
    )


def place(target: str) -> SingleDeviceSharding:
    """The first chip of a target."""
    return SingleDeviceSharding(devices(target)[0])


@contextlib.contextmanager
def lowered_for(target: str, sharding: Any) -> Iterator[None]:
    """Traces and lowers for a target; JAX 0.11 asks the mesh which GPU that is.

    Mosaic GPU takes the compute capability from a device that is there, and Hopper's without one.
    """
    # JAX 0.10 has it in one module, later ones in another.
    names = [f"jax.experimental.mosaic.gpu.{name}" for name in ("core", "utils")]
    modules = map(importlib.import_module, names if target in GPUS else [])
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "_infer_arch"):
                version = (GPUS[target]["major"], 0)
                stack.enter_context(mock.patch.object(module, "_infer_arch", return_value=version))
        stack.enter_context(jax.sharding.use_abstract_mesh(abstract_mesh(sharding)))
        yield


def abstract_mesh(sharding: Any) -> Any:
    """The mesh of a sharding, or of its one device, without the devices."""
    mesh = getattr(sharding, "mesh", None) or Mesh(np.array([*sharding.device_set]), ("one",))
    return mesh.abstract_mesh


def compiled(target: str, w: Any, sharding: Any, rows: int, activation_bits: int) -> str:
    """What the compiler says of a product."""
    x = jax.ShapeDtypeStruct((rows, w.shape[1]), jnp.bfloat16, sharding=sharding)
    run = jax.jit(lambda x, w: kernels.mixed_matmul(x, w, activation_bits))
    start = time.perf_counter()
    try:
        with lowered_for(target, sharding):
            memory = run.lower(x, w).compile().memory_analysis()
    except Exception as error:  # whatever the compiler raises
        return f"does not compile: {str(error).splitlines()[0][:600]} | "
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    return f"{memory.argument_size_in_bytes:,} | {memory.temp_size_in_bytes:,}"


if __name__ == "__main__":
    sys.exit(main())
