"""Runs compiled kernels without a GPU: the instructions of PTX that `direct` is compiled to.

    pip install 'qvla-jax[aot-gpu]' && python tests/kernels/ptx.py

compiles products for a Hopper GPU, has every instruction done for the 256 threads of every block,
as the manual of the instruction set (PTX ISA) describes it, and compares sums with the reference.
So what Mosaic GPU and LLVM made of the kernel computes the product; that the assembler and the
hardware follow the manual is left.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ml_dtypes
import numpy as np

THREADS = 256
KINDS = {
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32,
    "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
}  # fmt: skip
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


class Machine:
    """The threads of a block, all at the same instruction, and global memory."""

    def __init__(self, text: str, memory: np.ndarray, pointers: list[int]) -> None:
        body = text[text.index("{", text.index(".entry")) + 1 : text.rindex("}")]
        body = re.sub(r"//[^\n]*|^\s*\.[^\n]*$", "", body, flags=re.MULTILINE)
        # Instructions in braces have a register of their own, which is as good as any other.
        body = re.sub(r"\{\s*\.reg [^;]*;([^{}]*)\}", r"\1", body)
        lines = re.findall(r"\$\w+:|[^;:]+;", body)
        self.code = [line.strip(" \n\t;") for line in lines if not line.strip().startswith(".")]
        self.labels = {line[:-1]: i for i, line in enumerate(self.code) if line.endswith(":")}
        self.memory, self.pointers = memory, pointers

    def run(self, block: tuple[int, int, int]) -> None:
        """Runs a block to its end."""
        self.block, self.held, at = block, {}, 0
        while at < len(self.code):
            line = self.code[at]
            at += 1
            if line.endswith(":") or line.startswith("."):
                continue
            if guard := re.match(r"@(!?)(%\w+)\s+", line):
                taken = self.held[guard.group(2)] ^ bool(guard.group(1))
                assert taken.all() or not taken.any(), "threads part"
                if not taken.any():
                    continue
                line = line[guard.end() :]
            name, _, rest = line.partition(" ")
            name, rest = name.strip(), rest.strip()
            if "\t" in name:
                name, _, more = name.partition("\t")
                rest = f"{more} {rest}".strip()
            if name in ("ret", "exit"):
                return
            if name.split(".")[0] == "bra":
                at = self.labels[rest]
                continue
            self.do(name.split("."), arguments(rest))

    def value(self, text: str, kind: Any) -> np.ndarray:
        """An operand, for all threads."""
        thread = np.arange(THREADS)
        special = {
            "%tid.x": thread,
            **{
                f"%ctaid.{axis}": np.full(THREADS, n)
                for axis, n in zip("xyz", self.block, strict=True)
            },
        }
        if text in special:
            return special[text].astype(kind)
        if text in self.held:
            held = self.held[text]
        elif text.startswith("0f"):
            held = np.full(THREADS, int(text[2:], 16), np.uint32)
        else:
            held = np.full(THREADS, int(text, 0) & (2**64 - 1), np.uint64)
        size = np.dtype(kind).itemsize
        if held.dtype == bool:
            return held
        held = held.astype(np.dtype(f"u{held.dtype.itemsize}")) if held.dtype.kind == "i" else held
        bits = np.ascontiguousarray(held).view(f"u{held.dtype.itemsize}").astype(f"u{size}")
        return bits.view(kind)

    def put(self, name: str, value: np.ndarray) -> None:
        """Writes a register, as bits."""
        value = np.ascontiguousarray(value)
        self.held[name] = value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")

    def address(self, text: str) -> np.ndarray:
        """Addresses [register + number]."""
        base, _, offset = text.strip("[]").partition("+")
        return self.value(base, np.int64) + int(offset or 0)

    def do(self, name: list[str], args: list[Any]) -> None:
        """One instruction."""
        kind = KINDS.get(name[-1], np.uint32)
        match name:
            case ["ld", "param", _]:
                number = int(args[1].strip("[]").rsplit("_", 1)[1])
                self.put(args[0], np.full(THREADS, self.pointers[number], np.uint64))
            case ["bar" | "fence" | "griddepcontrol" | "barrier", *_]:
                pass
            case ["elect", "sync"]:
                one, chosen = args[0].split("|")
                self.put(one, np.zeros(THREADS, np.uint32))
                self.held[chosen] = np.arange(THREADS) % 32 == 0
            case ["shfl", "sync", "idx", _]:
                assert int(args[2]) == 0
                self.put(args[0], np.repeat(self.value(args[1], np.uint32)[::32], 32))
            case ["ld", *_]:
                at, targets = (
                    self.address(args[1]),
                    args[0] if isinstance(args[0], list) else [args[0]],
                )
                for number, target in enumerate(targets):
                    self.put(target, self.reached(at + number * kind().itemsize, kind))
            case ["st", *_]:
                at, sources = (
                    self.address(args[0]),
                    args[1] if isinstance(args[1], list) else [args[1]],
                )
                for number, source in enumerate(sources):
                    self.write(at + number * kind().itemsize, self.value(source, kind))
            case ["mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]:
                self.mma(*args)
            case ["mov", _] if isinstance(args[0], list):
                both = self.value(
                    args[1], np.uint64 if len(args[0]) * kind().itemsize == 8 else kind
                )
                parts = both.view(f"u{both.dtype.itemsize // len(args[0])}").reshape(THREADS, -1)
                for number, target in enumerate(args[0]):
                    self.put(target, parts[:, number])
            case ["mov", _] if isinstance(args[1], list):
                size = kind().itemsize // len(args[1])
                parts = [self.value(a, f"u{size}") for a in args[1]]
                self.put(args[0], np.stack(parts, 1).reshape(-1).view(f"u{kind().itemsize}"))
            case ["setp", how, _]:
                self.held[args[0]] = COMPARE[how](*(self.value(a, kind) for a in args[1:]))
            case ["selp", _]:
                a, b = (self.value(x, kind) for x in args[1:3])
                self.put(args[0], np.where(self.held[args[3]], a, b))
            case ["cvt", *_]:
                source, target = KINDS[name[-1]], KINDS[name[-2]]
                self.put(args[0], self.value(args[1], source).astype(target))
            case ["mul", "wide", _]:
                wide = np.dtype(f"{np.dtype(kind).kind}{2 * kind().itemsize}")
                a, b = (self.value(x, kind).astype(wide) for x in args[1:])
                self.put(args[0], a * b)
            case ["mad", "lo", _]:
                a, b, c = (self.value(x, kind) for x in args[1:])
                self.put(args[0], a * b + c)
            case [op, *_, "bf16x2"]:
                a, b, *c = (
                    self.value(x, np.uint32).view(ml_dtypes.bfloat16).astype(np.float32)
                    for x in args[1:]
                )
                found = {"add": a + b, "sub": a - b, "fma": a * b + (c[0] if c else 0)}[op]
                self.put(args[0], found.astype(ml_dtypes.bfloat16).view(np.uint32))
            case ["fma", "rn", "f32"]:
                a, b, c = (self.value(x, np.float32).astype(np.float64) for x in args[1:])
                self.put(args[0], (a * b + c).astype(np.float32))
            case ["bfe", _]:
                a, start, size = (self.value(x, np.uint32) for x in args[1:])
                self.put(args[0], (a >> start) & ((np.uint32(1) << size) - np.uint32(1)))
            case _:
                self.put(args[0], self.plain(name, kind, args[1:]))

    def plain(self, name: list[str], kind: Any, args: list[str]) -> np.ndarray:
        """Instructions of one or two operands."""
        a, *rest = (self.value(x, kind) for x in args)
        b = rest[0] if rest else a
        if name[0] in ("shl", "shr"):
            b = self.value(args[1], np.uint32).astype(kind)
        return {
            "mov": lambda: a, "cvta": lambda: a, "and": lambda: a & b, "or": lambda: a | b,
            "xor": lambda: a ^ b, "not": lambda: ~a, "add": lambda: a + b, "sub": lambda: a - b,
            "mul": lambda: a * b, "shl": lambda: a << b, "shr": lambda: a >> b,
            "min": lambda: np.minimum(a, b), "max": lambda: np.maximum(a, b), "neg": lambda: -a,
            "div": lambda: a // b, "rem": lambda: a % b,
        }[name[0]]()  # fmt: skip

    def reached(self, at: np.ndarray, kind: Any) -> np.ndarray:
        """What memory holds at addresses."""
        size = np.dtype(kind).itemsize
        assert (at % size == 0).all(), "not aligned"
        assert at.min() >= 0, "below memory"
        assert at.max() + size <= self.memory.nbytes, "beyond memory"
        return self.memory.view(f"u{size}")[at // size].view(kind)

    def write(self, at: np.ndarray, value: np.ndarray) -> None:
        """Puts values to addresses."""
        self.memory.view(f"u{value.dtype.itemsize}")[at // value.dtype.itemsize] = value.view(
            f"u{value.dtype.itemsize}"
        )

    def mma(self, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
        """m16n8k16: fragments of bfloat16 and float32, warp by warp."""
        lane = np.arange(THREADS) % 32
        warp, group, member = np.arange(THREADS) // 32, lane // 4, lane % 4
        warps = THREADS // 32
        left = np.zeros((warps, 16, 16), np.float32)
        right = np.zeros((warps, 16, 8), np.float32)
        sums = np.zeros((warps, 16, 8), np.float32)

        def pair(name: str) -> np.ndarray:
            bits = self.value(name, np.uint32)
            return bits.view(ml_dtypes.bfloat16).reshape(-1, 2).astype(np.float32)

        for i in range(8):  # a0 ... a7
            row = group + 8 * (i % 4 >= 2)
            column = 2 * member + i % 2 + 8 * (i >= 4)
            left[warp, row, column] = pair(a[i // 2])[:, i % 2]
        for i in range(4):  # b0 ... b3
            right[warp, 2 * member + i % 2 + 8 * (i >= 2), group] = pair(b[i // 2])[:, i % 2]
        places = [(group + 8 * (i >= 2), 2 * member + i % 2) for i in range(4)]
        for (row, column), name in zip(places, c, strict=True):
            sums[warp, row, column] = self.value(name, np.float32)
        sums = (left.astype(np.float64) @ right + sums).astype(np.float32)
        for (row, column), name in zip(places, d, strict=True):
            self.put(name, sums[warp, row, column])


def arguments(text: str) -> list[Any]:
    """Operands; those in braces are lists."""
    found = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text)
    return [
        [a.strip() for a in f.strip("{}").split(",")] if f.startswith("{") else f for f in found
    ]


def compiled(run: Callable[..., Any], *args: Any) -> str:
    """PTX of the one Mosaic kernel in `run`, for an H100."""
    import ahead_of_time
    import jax
    from jax.sharding import SingleDeviceSharding

    place = SingleDeviceSharding(ahead_of_time.devices("h100")[0])
    shapes = jax.tree.map(lambda a: ahead_of_time.placed_shape(a, place), args)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with jax.sharding.use_abstract_mesh(ahead_of_time.abstract_mesh(place)):
            jax.jit(run).lower(*shapes).compile()
        (found,) = Path(folder).glob("*.ptx")
        return found.read_text()


def error(bits: list[int], group: int | None, rows: int, exact: bool) -> float:
    """The largest error of a sum that the compiled kernel makes, as a share of the largest sum."""
    import jax
    import jax.numpy as jnp

    from qvla_jax import kernels
    from qvla_jax.kernels import fragments, gpu_kernels, pallas_gpu

    random = np.random.default_rng(0)
    c, k = 200, 700
    weight = random.normal(size=(c, k)).astype(ml_dtypes.bfloat16)
    packed = kernels.pack(weight, random.choice(bits, c), group)
    tiled = kernels.prepare(packed, "pallas_gpu").tiled
    launch, streamed = pallas_gpu.division(tiled, rows, exact, 0)
    assert not streamed
    x = random.normal(size=(rows, k)) + 1
    padding = ((0, -rows % launch.rows), (0, tiled.padded_k - k))
    x = jnp.pad(jnp.asarray(x, jnp.bfloat16), padding)
    args = np.asarray(fragments.columns(x)), tiled.words, tiled.scales
    run = jax.tree_util.Partial(gpu_kernels.direct, launch)
    text = compiled(lambda *a: run(a[:1], *a[1:], interpret=False), *args)
    expected = np.asarray(run(args[:1], *args[1:], interpret=True))
    sums = np.full(expected.shape, np.nan, np.float32)
    # Parameters are in the order in which the kernel first uses them, and tiles of 16 bits, which
    # have no scales, come first.
    arrays = [args[1], args[0], *([args[2]] if group else [])]
    arrays.insert(2 if launch.works[0].bits == 16 else len(arrays), sums)
    starts = np.cumsum([256, *(-(-a.nbytes // 256) * 256 for a in arrays)])
    memory = np.zeros(starts[-1], np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        memory[start : start + array.nbytes] = (
            np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        )
    machine = Machine(text, memory, [int(start) for start in starts[:-1]])
    for unit, row in np.ndindex(expected.shape[0], expected.shape[2] // launch.rows):
        machine.run((row, unit, 0))
    start = next(start for start, array in zip(starts, arrays, strict=False) if array is sums)
    found = memory[start : start + sums.nbytes].view(np.float32).reshape(sums.shape)
    assert np.isfinite(found).all(), "a sum is not written"
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    for bits, group, rows, exact in (
        ([2, 4, 8, 16], None, 3, False),
        ([2, 3, 4, 8, 16], None, 3, True),
        ([2, 4, 8, 16], 48, 11, False),
        ([4], 128, 40, True),
    ):
        found = error(bits, group, rows, exact)
        print(
            f"{bits} bits, groups {group}, {rows} rows, {'exact' if exact else 'fast'}: {found:.1e}"
        )
        assert found < 1e-6
