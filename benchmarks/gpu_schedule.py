"""Estimates of the packed product on NVIDIA GPUs, from the code that it is compiled to.

    pip install 'qvla-jax[aot-gpu]' && python benchmarks/gpu_schedule.py h100 a100

compiles `pallas_gpu` ahead of time, assembles it, and counts. Nothing runs, and **every time is an
estimate**: bytes over bandwidth, instructions over issue slots, products over tensor cores, each as
if it were alone and all processors were equally busy. Latencies, launches, caches, bank conflicts
and what XLA does around the kernel are left out. A row of instructions is what one warp issues for
8 KiB of words of its warpgroup, in the loop over blocks.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import ahead_of_time
import jax
import jax.numpy as jnp

from qvla_jax import kernels
from qvla_jax.kernels import fragments, pallas_gpu
from qvla_jax.kernels.gpu_kernels import Launch
from qvla_jax.kernels.packed import PackedWeight

# What the assembler calls a processor; registers and threads that it has; products that its tensor
# cores do a cycle in bfloat16.
ARCHITECTURES: Final = {"h100": "sm_90a", "a100": "sm_80", "b200": "sm_100a"}
REGISTERS: Final = 65536
THREADS: Final = 2048
PRODUCTS: Final = {"h100": 2048, "a100": 1024, "b200": 4096}
# Two warpgroups.
BLOCK: Final = 256
# Shared memory that the driver takes of each program.
RESERVED: Final = 1024
TENSOR: Final = ("HMMA", "HGMMA", "IMMA")
LABELS: Final = ("2", "4", "8", "mixed", "4g128")


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that multiplies."""

    instructions: int
    by_name: dict[str, int]

    @property
    def products(self) -> int:
        """Instructions for tensor cores."""
        return sum(n for name, n in self.by_name.items() if name.split(".")[0] in TENSOR)


@dataclasses.dataclass(frozen=True)
class Program:
    """An assembled kernel."""

    registers: int
    spills: int
    shared: int
    instructions: int
    loops: tuple[Loop, ...]

    def programs(self, target: str) -> int:
        """How many fit on a processor at once."""
        gpu = ahead_of_time.GPUS[target]
        by_registers = REGISTERS // (BLOCK * -(-self.registers // 8) * 8)
        by_memory = gpu["core_memory"] // (self.shared + RESERVED)
        return min(by_registers, by_memory, THREADS // BLOCK)


def parse_code(text: str) -> tuple[int, tuple[Loop, ...]]:
    """Instructions and multiplying loops in what nvdisasm prints.

    Of loops that share instructions for tensor cores, the shortest one counts.
    """
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(found)
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(code.group(1).strip())
    names = [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in found]
    ranges = []
    for end, line in enumerate(found):
        branch = re.search(r"\bBRA\S*\s.*?`\((\.L_x_\d+)\)", line)
        start = labels.get(branch.group(1), end) if branch else end
        if start < end:
            ranges.append((end - start, start, end + 1))
    loops: list[Loop] = []
    taken: set[int] = set()
    for _, start, end in sorted(ranges):
        tensor = {i for i in range(start, end) if names[i].split(".")[0] in TENSOR}
        if tensor - taken:
            taken |= tensor
            loops.append(Loop(end - start, dict(collections.Counter(names[start:end]))))
    return len(found), tuple(loops)


def parse_log(text: str) -> tuple[int, int]:
    """Registers and spilled bytes in what ptxas -v prints."""
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill", text)
    if registers is None:
        raise ValueError(f"ptxas: {text.strip() or 'no output'}")
    return int(registers.group(1)), sum(map(int, spills))


def tool(name: str) -> str:
    """A program of the CUDA toolkit, from pip's packages or the path."""
    package = importlib.util.find_spec("nvidia")
    folders = list(package.submodule_search_locations or []) if package else []
    folders = [os.environ.get("CUDA_BIN", ""), *(f"{folder}/cu13/bin" for folder in folders)]
    for folder in filter(None, folders):
        if (found := Path(folder, name)).exists():
            return str(found)
    if found := shutil.which(name):
        return found
    sys.exit(f"{name} is missing: pip install 'qvla-jax[aot-gpu]', or name its folder in CUDA_BIN")


def assembled(folder: Path, target: str) -> Program:
    """The kernel that Mosaic GPU dumped in a folder."""
    (ptx,) = folder.glob("*.ptx")
    cubin = ptx.with_suffix(".cubin")
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    command = [tool("ptxas"), "-v", f"-arch={ARCHITECTURES[target]}", str(ptx), "-o", str(cubin)]
    registers, spills = parse_log(run(command).stderr)
    count, loops = parse_code(run([tool("nvdisasm"), "-c", str(cubin)]).stdout)
    (log,) = folder.glob("*.mlir-passes.log")
    shared = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", log.read_text())
    return Program(registers, spills, max(map(int, shared), default=0), count, loops)


def program(target: str, w: PackedWeight, rows: int, activation_bits: int) -> Program:
    """The product's kernel, compiled."""
    chip = ahead_of_time.devices(target)[0]
    weight, sharding = ahead_of_time.on_one(w, target, chip, "pallas_gpu")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with ahead_of_time.lowered_for(target, sharding):
            x = jax.ShapeDtypeStruct((rows, w.shape[1]), jnp.bfloat16, sharding=sharding)
            run = jax.jit(lambda x, w: kernels.mixed_matmul(x, w, activation_bits))
            run.lower(x, weight).compile()
        return assembled(Path(folder), target)


def division(target: str, w: PackedWeight, rows: int) -> tuple[Launch, bool]:
    """See `pallas_gpu.division`."""
    with ahead_of_time.lowered_for(target, ahead_of_time.place(target)):
        tiled = jax.eval_shape(lambda w: kernels.prepare(w, "pallas_gpu"), w).tiled
        return pallas_gpu.division(tiled, rows, exact=False, exceptions=0)


@functools.cache
def per_words(target: str, bits: int, group: int | None, rows: int, n: int, k: int) -> float:
    """Instructions of a warp for 8 KiB of words of one width, in units of n rows of x."""
    w = ahead_of_time.shapes(1024, max(k, 4096), {bits: 1024}, group)
    # One unit loops over all inputs.
    alone = mock.patch.object(pallas_gpu, "UNITS", 1)
    with alone, mock.patch.object(pallas_gpu, "_rows_of_unit", return_value=n):
        found = program(target, w, rows, 16)
        launch, streamed = division(target, w, rows)
    (loop,) = found.loops
    # A run of 64 inputs takes 4 steps, each of them one instruction for all rows of `wgmma`, and
    # one for 8 rows of `mma`; `fast` has as many again for constants.
    steps = fragments.RUN // fragments.STEP
    each = steps if streamed else steps * launch.rows // fragments.COLUMNS
    each *= 2 if launch.fast and not streamed and bits in (2, 4) else 1
    kibibytes = loop.products / each * bits * fragments.LANES * 4 / 1024
    return loop.instructions * 8 / kibibytes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A line of the table; times in microseconds."""

    target: str
    weight: str
    rows: int
    activation_bits: int
    kernel: str
    registers: int
    spills: int
    shared: int
    programs: int
    units: int
    instructions: dict[int, int]
    memory: float
    issue: float
    tensor: float


def estimate(target: str, shape: str, label: str, rows: int, activation_bits: int) -> Estimate:
    """Compiles a product and adds up what it takes."""
    gpu = ahead_of_time.GPUS[target]
    c, k = map(int, shape.split("x"))
    w = weight(c, k, label)
    found = program(target, w, rows, activation_bits)
    launch, streamed = division(target, w, rows)
    passes = -(-rows // launch.rows)
    words = {work.bits: work.tiles * work.blocks * 16384 for work in launch.works}
    counts = {
        bits: per_words(target, bits, w.group if bits < 16 else None, rows, launch.rows, k)
        for bits in words
    }
    issue = sum(counts[bits] * size / 8192 for bits, size in words.items()) * passes / gpu["cores"]
    # x and the sums of units cross memory as well; caches may save that.
    sums = sum(work.units for work in launch.works) * fragments.LANES * passes * launch.rows * 4
    traffic = sum(words.values()) + rows * k * 2 + 2 * sums + rows * c * 2
    inputs = (work.tiles * work.blocks * fragments.runs(work.bits) for work in launch.works)
    products = fragments.LANES * fragments.RUN * sum(inputs) * passes * launch.rows
    hertz = gpu["clock"] * 1e3
    return Estimate(
        target=target,
        weight=f"{shape}, {label}",
        rows=rows,
        activation_bits=activation_bits,
        kernel="streamed" if streamed else "direct",
        registers=found.registers,
        spills=found.spills,
        shared=found.shared,
        programs=found.programs(target),
        units=sum(work.units for work in launch.works) * passes,
        instructions={bits: math.ceil(count) for bits, count in counts.items()},
        memory=traffic / gpu["bandwidth"] * 1e6,
        issue=issue / hertz,
        tensor=products / PRODUCTS[target] / gpu["cores"] / hertz,
    )


def weight(c: int, k: int, label: str) -> PackedWeight:
    """Shapes of a packed weight by its label: bits, bits in groups, or mixed."""
    if label == "mixed":
        rows = {bits: round(share * c) for bits, share in ahead_of_time.MIXED.items()}
        return ahead_of_time.shapes(c, k, rows, None)
    bits, _, group = label.partition("g")
    return ahead_of_time.shapes(c, k, {int(bits): c}, int(group) if group else None)


def table(found: Sequence[Estimate]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "Estimates from compiled code; nothing ran. Times in microseconds, each as if alone."
    yield ""
    yield (
        "| GPU | weight | rows | activations | kernel | registers | shared | programs | units "
        "| instructions for 8 KiB | memory | issue | tensor |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for e in found:
        counts = ", ".join(f"{count} ({bits} bits)" for bits, count in e.instructions.items())
        spilled = f" + {e.spills} B spilled" if e.spills else ""
        activations = "bfloat16" if e.activation_bits == 16 else f"int{e.activation_bits}"
        yield (
            f"| {e.target} | {e.weight} | {e.rows} | {activations} | {e.kernel} "
            f"| {e.registers}{spilled} | {e.shared:,} | {e.programs} | {e.units} | {counts} "
            f"| {e.memory:.1f} | {e.issue:.1f} | {e.tensor:.1f} |"
        )


def main() -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", choices=[*ARCHITECTURES])
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--weight", nargs="+", default=LABELS, help="bits, bits g group, mixed")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 600])
    parser.add_argument("--activations", nargs="+", type=int, default=[16], choices=(16, 8, 4))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: list[Any] = [
        estimate(target, shape, label, rows, bits)
        for target in arguments.targets
        for shape in arguments.shape
        for label in arguments.weight
        for rows in arguments.rows
        for bits in arguments.activations
    ]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(line) for line in found], indent=1))
    else:
        print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
