"""Estimates of the packed product from the schedules of programs compiled for accelerators.

    pip install 'qvla-jax[aot-tpu]' && python benchmarks/static_schedule.py v5e v6e
    pip install 'qvla-jax[aot-gpu]' && python benchmarks/static_schedule.py h100

**Every figure is an estimate, in microseconds; nothing runs on an accelerator.** Each line is one
product, compiled for one chip. "memory" is the time in which memory delivers its operands once, as
the kernel reads them, and takes its results. "issue" is the bundles of instructions that the kernel
executes, latencies included, at the clock of the chip (`tpu_bundles.py`), "a block" their number
for each block of words, and "around" the time of what XLA runs before and after the kernel. "slots"
names the kind of instruction of which its bundles are fullest. XLA's own products of the same
shape, with plain operands, stand beside it, each with the longer of its issue and its memory time:
bfloat16, int8 with activations in int8 as they come or rounded from bfloat16, and int4 with
bfloat16 activations.

Left out: waiting for memory beyond the bytes (for the first block of a kernel, and for what does
not come in time), conflicts in memory, the fetching of instructions, and the launch of programs.
`--parts` lists how often which bundles are executed. Lines of GPUs are those of `gpu_schedule.py`.
"""

import argparse
import dataclasses
import glob
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

DUMPS: Final = tempfile.TemporaryDirectory(prefix="static-schedule-")
# libtpu reads its settings when it is loaded.
os.environ["LIBTPU_INIT_ARGS"] = " ".join(
    [
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        f"--xla_jf_dump_to={DUMPS.name}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=(packed-bundles-post-ra|pre-delay_hlo.*)",
    ]
)

import ahead_of_time as aot  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tpu_bundles  # noqa: E402

from qvla_jax import kernels  # noqa: E402
from qvla_jax.kernels import tpu_weight  # noqa: E402
from qvla_jax.kernels.activations import quantize_activations  # noqa: E402
from qvla_jax.kernels.packed import PackedWeight  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU: cycles and bytes of memory, each in a second."""

    clock: float
    bandwidth: float


# Clocks follow from the peak rates and the sizes of the matrix units; rates are the vendor's.
CHIPS: Final = {
    "v5e": Chip(1.5e9, 8.2e11),
    "v5p": Chip(1.75e9, 2.765e12),
    "v6e": Chip(1.75e9, 1.64e12),
}
KERNEL: Final = "qvla"  # how the names of the packed product's kernels begin
WEIGHTS: Final[Mapping[str, tuple[dict[int, float], int | None]]] = {
    "mixed": (aot.MIXED, None),
    "2": ({2: 1.0}, None),
    "4": ({4: 1.0}, None),
    "8": ({8: 1.0}, None),
    "4g128": ({4: 1.0}, 128),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a compiled program executes."""

    bundles: dict[str, int]  # of each of its kernels
    slots: dict[str, float]  # of the kernel that is named, as shares of its bundles' capacity
    parts: list[tuple[int, int, int]]  # (first bundle, end, times), likewise
    bytes: int  # of arguments and results
    temporary: int  # bytes
    # Bytes that its operations read and write, by XLA's count; XLA counts no kernels' operations.
    accessed: float
    blocks: int  # steps of the kernel's grid in which it reads words


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", choices=[*CHIPS, *aot.GPUS])
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--weight", nargs="+", default=["2", "4", "mixed"], choices=WEIGHTS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 600])
    parser.add_argument("--activations", nargs="+", type=int, default=[16, 8], choices=[16, 8])
    parser.add_argument("--alone", action="store_true", help="leave out XLA's own products")
    parser.add_argument("--parts", action="store_true", help="list where the bundles are")
    arguments = parser.parse_args()
    if gpus := [target for target in arguments.targets if target in aot.GPUS]:
        # In a process of its own: it has other settings of the compiler.
        given = ("shape", "weight", "rows", "activations")
        options = [[f"--{name}", *map(str, getattr(arguments, name))] for name in given]
        program = Path(__file__).with_name("gpu_schedule.py")
        done = subprocess.run([sys.executable, program, *gpus, *itertools.chain(*options)])
        if done.returncode or len(gpus) == len(arguments.targets):
            return done.returncode
    print(
        "| target | shape, weight | rows | activations | memory | issue | issue / memory |"
        " a block | around | slots | XLA bf16 | XLA int8 | rounded | XLA int4 |"
    )
    print("|---|" + "---|" * 13)
    for target, shape, rows in itertools.product(
        (target for target in arguments.targets if target in CHIPS),
        arguments.shape,
        arguments.rows,
    ):
        c, k = (int(n) for n in shape.split("x"))
        rivals = " | ".join(
            "" if arguments.alone else microseconds(plain_time(target, c, k, rows, kind))
            for kind in ("bf16", "int8", "rounded", "int4")
        )
        for label, bits in itertools.product(arguments.weight, arguments.activations):
            found = packed(target, weight(label, c, k), rows, bits)
            kind = "bfloat16" if bits == 16 else "int8"
            what = f"{target} | {shape}, {label} | {rows} | {kind}"
            print(f"| {what} | {described(found, CHIPS[target])} | {rivals} |", flush=True)
            if arguments.parts:
                print({name: f"{share:.0%}" for name, share in found.slots.items()})
                for start, stop, times in found.parts:
                    print(f"  bundles {start}-{stop}: {stop - start} x {times}")
    return 0


def described(found: Schedule, chip: Chip) -> str:
    """The cells of a line that are about a product with a packed weight."""
    (kernel,) = (count for name, count in found.bundles.items() if name.startswith(KERNEL))
    memory, issue = found.bytes / chip.bandwidth, kernel / chip.clock
    around = (sum(found.bundles.values()) - kernel) / chip.clock
    slot = max(found.slots, key=found.slots.__getitem__)
    return (
        f"{microseconds(memory)} | {microseconds(issue)} | {issue / memory:.2f} |"
        f" {kernel / found.blocks:.0f} | {microseconds(around)} | {slot} {found.slots[slot]:.0%}"
    )


def microseconds(seconds: float) -> str:
    """With two or three digits."""
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def weight(label: str, c: int, k: int) -> PackedWeight:
    """Shapes of a packed weight of some kind."""
    shares, group = WEIGHTS[label]
    w = aot.shapes(c, k, {width: round(share * c) for width, share in shares.items()}, group)
    return dataclasses.replace(w, index=None) if len(shares) == 1 else w


def packed(
    target: str, w: PackedWeight, rows: int, bits: int, dtype: Any = jnp.bfloat16
) -> Schedule:
    """The product with a packed weight, of activations of a dtype that are rounded to bits."""
    prepared, sharding = aot.on_one(w, target, aot.devices(target)[0])
    x = jax.ShapeDtypeStruct((rows, w.shape[1]), dtype, sharding=sharding)
    columns = tpu_weight.step_tables(prepared.tiled).values()
    # Numbers that are not integers steer nothing.
    tables = {i: column for i, column in enumerate(columns) if column.dtype == np.int32}
    return compiled(lambda x, w: kernels.mixed_matmul(x, w, bits), x, prepared, KERNEL, tables)


def plain_time(target: str, c: int, k: int, rows: int, kind: str) -> float:
    """Seconds of XLA's own product with plain operands: bf16, int8, rounded or int4."""
    sharding = jax.sharding.SingleDeviceSharding(aot.devices(target)[0])
    integers = kind in ("int8", "rounded")
    given = jnp.int8 if kind == "int8" else jnp.bfloat16
    held = {"bf16": jnp.bfloat16, "int4": jnp.int4}.get(kind, jnp.int8)
    x = jax.ShapeDtypeStruct((rows, k), given, sharding=sharding)
    w = jax.ShapeDtypeStruct((k, c), held, sharding=sharding)

    def product(x: Any, w: Any) -> Any:
        scale = 1.0
        if kind == "rounded":
            x, scale = quantize_activations(x, 8)
        kept = w if integers else w.astype(jnp.bfloat16)
        y = jnp.dot(x, kept, preferred_element_type=jnp.int32 if integers else jnp.float32)
        return (y.astype(jnp.float32) * scale).astype(jnp.bfloat16)

    found, chip = compiled(product, x, w, "", {}), CHIPS[target]
    return max(found.bytes / chip.bandwidth, sum(found.bundles.values()) / chip.clock)


def compiled(run: Any, x: Any, w: Any, name: str, tables: Mapping[int, np.ndarray]) -> Schedule:
    """Compiles a function and counts what its programs execute."""
    for path in glob.glob(f"{DUMPS.name}/*"):
        os.remove(path)
    program = jax.jit(run).lower(x, w).compile()
    memory, costs = program.memory_analysis(), program.cost_analysis() or {}
    bundles, slots, parts = {}, {}, []
    for path in sorted(glob.glob(f"{DUMPS.name}/*-packed-bundles-post-ra.txt")):
        found = re.match(r"\d+-(.*)-\d+-packed", Path(path).name)
        # What runs before and after every program, and the program that calls the others.
        if not found or found.group(1) == "TLP" or found.group(1).startswith("<"):
            continue
        program = found.group(1)
        own = program.startswith(name) and bool(name)
        counts = tpu_bundles.executed(
            tpu_bundles.parse(Path(path).read_text(errors="replace")), tables if own else {}
        )
        bundles[program] = int(counts.sum())
        if own:
            parts = sections(counts)
            slots = occupied(re.sub(r"-\d+-packed-.*", "", path), counts)
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Schedule(
        bundles=bundles,
        slots=slots,
        parts=parts,
        bytes=moved,
        temporary=memory.temp_size_in_bytes,
        accessed=costs.get("bytes accessed", 0.0),
        blocks=max(map(len, tables.values()), default=0),
    )


def sections(counts: np.ndarray) -> list[tuple[int, int, int]]:
    """Runs of bundles that are executed equally often: (first, end, times)."""
    edges = [0, *(np.flatnonzero(np.diff(counts)) + 1), len(counts)]
    return [(int(a), int(b), int(counts[a])) for a, b in itertools.pairwise(edges) if counts[a]]


def occupied(stem: str, counts: np.ndarray) -> dict[str, float]:
    """How full the slots of executed bundles are; files of the program begin with `stem`."""
    (path,) = glob.glob(f"{glob.escape(stem)}-*utilization.txt")
    names, capacity, used = tpu_bundles.slots(Path(path).read_text())
    # The last bundles may be missing.
    total = counts[: len(used)] @ used
    filled = total / (capacity * counts.sum())
    return {name: float(share) for name, share in zip(names, filled, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
