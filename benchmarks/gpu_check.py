"""Proves, times and runs the packed product on the GPU that is there; `benchmarks/gpu.sh` calls it.

    python benchmarks/gpu_check.py --out gpu.json
    python benchmarks/gpu_check.py --out gpu.json --small    # without a GPU: interpreted, no times

Each step adds to the file as soon as it is done, and no step begins after `--seconds`. A product is
proved against the reference on the same device, in float32 with full precision, by the tolerance
of `tests/kernels`. A time is the median over calls of one program that multiplies by several copies
of a weight in turn, more than the second-level cache holds, divided by the copies.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import ahead_of_time
import full_size
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as mixed_type

from qvla_jax import kernels
from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.families.prismatic.network import abstract_model
from qvla_jax.families.prismatic.unread import drop_unread
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference import Policy
from qvla_jax.inference.packed_linear import PackedArrays, PackedLinear
from qvla_jax.inference.policy import make_policy
from qvla_jax.kernels import pallas_gpu
from qvla_jax.models import named_modules, replace_modules
from qvla_jax.quantization import quantizable_layers

SHAPES: Final = ("4096x4096", "11008x4096", "4096x11008")
ROWS: Final = (1, 8, 64, 600)
# Copies of a weight take more than this, five times the cache of an H200.
ROTATION: Final = 256 << 20
CALLS: Final = 20


class Report:
    """What was found so far, in a file."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.stop = path, time.monotonic() + seconds
        self.found: dict[str, Any] = {"device": {}, "proofs": [], "times": [], "chunk": {}}

    def add(self, part: str, value: Any) -> None:
        """Adds to a part and writes the file."""
        if isinstance(self.found[part], list):
            self.found[part].append(value)
        else:
            self.found[part].update(value)
        print(part, json.dumps(value), flush=True)
        self.path.write_text(json.dumps(self.found, indent=1))

    def steps(self, part: str, steps: Iterator[tuple[dict[str, Any], Callable[[], Any]]]) -> None:
        """Runs steps while there is time; what fails says so."""
        for label, step in steps:
            if time.monotonic() > self.stop:
                self.add(part, {**label, "skipped": "out of time"})
                continue
            try:
                self.add(part, {**label, **step()})
            except Exception as error:  # whatever the compiler or the device raises
                traceback.print_exc()
                self.add(part, {**label, "failed": str(error).splitlines()[0][:300]})


def ways() -> list[str]:
    """Kernels that run here: both launches of `pallas_gpu` on Hopper."""
    return ["direct", *(["streamed"] if pallas_gpu.is_hopper() else [])]


def products(small: bool) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Cases to prove: few, because each is compiled, and all widths in most of them."""
    c, k = (130, 200) if small else (700, 1100)
    mixed, four = [0, 2, 3, 4, 8, 16], [4]
    cases: list[tuple[str, list[int], int | None, int, int, str]] = []
    for way in ways():
        # Groups of 48 are in `direct` alone, and so are few rows.
        groups = (None, 48, 128) if way == "direct" else (None, 128)
        counts = (3,) if small else (1, 40) if way == "direct" else (17, 600)
        for group, rows, bits in itertools.product(groups, counts, (16, 8)):
            cases.append((way, mixed, group, rows, bits, "bfloat16"))
        if not small:
            cases.append((way, mixed, None, counts[0], 16, "float32"))
            cases.append((way, four, None, counts[0], 16, "bfloat16"))
    for way, bits, group, m, activation_bits, dtype in cases:
        label = {
            "kernel": way, "bits": bits, "group": group, "rows": m,
            "activation_bits": activation_bits, "dtype": dtype,
        }  # fmt: skip
        yield label, functools.partial(proved, c=c, k=k, **label)


def proved(
    *, c: int, k: int, kernel: str, bits: list[int], group: int | None, rows: int,
    activation_bits: int, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """The largest error, as a share of what is allowed; activations have a mean unlike zero."""
    random = np.random.default_rng(0)
    weight = (0.05 * random.normal(size=(c, k))).astype(ml_dtypes.bfloat16)
    w = kernels.pack(weight, random.choice(bits, c), group)
    x = jnp.asarray(random.normal(size=(rows, k)) + 0.5, dtype)
    own, pallas_gpu.is_hopper = pallas_gpu.is_hopper, lambda: kernel == "streamed"
    try:
        # A function of its own: what is compiled depends on the kernel.
        run = jax.jit(lambda x, w: kernels.mixed_matmul(x, w, activation_bits))
        found = run(x, kernels.prepare(w, "pallas_gpu"))
    finally:
        pallas_gpu.is_hopper = own
    expected = kernels.mixed_matmul(x, w, activation_bits, "reference")
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    length = np.linalg.norm(np.asarray(x, np.float64), axis=1)[:, None]
    # Constants that come off the sums leave more of their rounding there.
    allowed = 2e-5 * length * np.linalg.norm(np.asarray(kernels.dequantize(w)), axis=1) + 1e-5
    if dtype == "bfloat16":  # both were rounded
        allowed = allowed + np.abs(expected) * 2.0**-7
    share = float((np.abs(found - expected) / allowed).max())
    return {"error_of_allowed": share, "ok": share <= 1.0}


def timed(run: Callable[..., Any], x: jax.Array, copies: list[Any]) -> dict[str, float]:
    """Microseconds of a product, from calls of one program that uses all copies in turn."""
    once = jax.jit(run)  # traced and lowered once
    program = jax.jit(lambda x, copies: [once(x, w) for w in copies])
    jax.block_until_ready(program(x, copies))
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(program(x, copies))
        seconds.append(time.perf_counter() - start)
    return {"microseconds": 1e6 * statistics.median(seconds) / len(copies)}


def copied(make: Callable[[jax.Array], Any], small: bool) -> list[Any]:
    """As many weights as do not fit into the cache together."""
    first = make(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    count = 2 if small else max(2, -(-ROTATION // size))
    return [first, *(make(jax.random.key(number)) for number in range(1, count))]


@functools.partial(jax.jit, static_argnums=0)
def random_weight(shapes: kernels.PackedWeight, key: jax.Array) -> Any:
    """An arranged weight of random codes; of small numbers at 16 bits."""
    prepared = jax.eval_shape(lambda w: kernels.prepare(w, "pallas_gpu"), shapes)
    words = jax.random.bits(key, prepared.tiled.words.shape, jnp.uint32)
    if shapes.segments[0].bits == 16:
        # No exponent is large, whatever the other bits are.
        words = words & np.uint32(0xBF7FBF7F)
    filled = jax.tree.map(lambda a: jnp.full(a.shape, 0.01, a.dtype), prepared)
    tiled = dataclasses.replace(filled.tiled, words=jax.lax.bitcast_convert_type(words, jnp.int32))
    position = jnp.arange(shapes.shape[0], dtype=jnp.int32)
    return dataclasses.replace(filled, tiled=tiled, position=position)


def rivals(c: int, k: int, small: bool) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """Name, product and how to make a weight."""

    def normal(dtype: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda key: (0.05 * jax.random.normal(key, (c, k), jnp.float32)).astype(dtype)

    def codes(key: jax.Array, dtype: Any = jnp.int8) -> jax.Array:
        return jax.random.randint(key, (c, k), -7, 8, jnp.int8).astype(dtype)

    def int8(x: jax.Array, w: jax.Array) -> jax.Array:
        scale = jnp.max(jnp.abs(x), axis=1, keepdims=True).astype(jnp.float32) / 127
        q = jnp.round(x / scale).astype(jnp.int8)
        sums = jax.lax.dot_general(q, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return (sums * scale).astype(jnp.bfloat16)

    yield "XLA bfloat16", lambda x, w: x @ w.T, normal(jnp.bfloat16)
    yield "XLA int8, rounding included", int8, codes
    int4 = functools.partial(codes, dtype=jnp.int4)
    yield "XLA int4, widened", lambda x, w: x @ w.astype(x.dtype).T, int4
    if not small and pallas_gpu.is_hopper():
        yield "JAX mixed-type kernel, int8 x bfloat16", jax_mixed, codes


def jax_mixed(x: jax.Array, w: jax.Array) -> jax.Array:
    """JAX's own kernel, which takes whole tiles: y^T = w x^T with padded rows."""
    config = mixed_type.TuningConfig(
        tile_m=128, tile_n=64, tile_k=64, max_concurrent_steps=4, epi_tile_n=64, epi_tile_m=64,
        wg_dimension=mixed_type.MatmulDimension.M,
    )  # fmt: skip
    rows = jnp.pad(x, ((0, -x.shape[0] % 64), (0, 0))).T
    return mixed_type.mixed_matmul_kernel(w, rows, out_dtype=jnp.bfloat16, config=config)


def measurements(
    small: bool,
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, float]]]]:
    """Products to time, the most telling ones of all shapes first."""
    shapes, rows = (("128x256",), (1,)) if small else (SHAPES, ROWS)
    found = [
        (first, shape, name, run, functools.lru_cache(functools.partial(copied, made, small)))
        for shape in shapes
        for first, name, run, made in contenders(shape, small)
    ]
    for level, (first, shape, name, run, held) in itertools.product((True, False), found):
        if first != level:
            continue
        for m in rows:
            x = jax.random.normal(jax.random.key(m), (m, int(shape.split("x")[1])), jnp.bfloat16)
            label = {"shape": shape, "rows": m, "product": name}
            yield label, lambda run=run, x=x, held=held: timed(run, x, held())


def contenders(shape: str, small: bool) -> Iterator[tuple[bool, str, Callable[..., Any], Any]]:
    """Whether it is timed first, name, product and how to make a weight."""
    c, k = map(int, shape.split("x"))
    for name, run, made in rivals(c, k, small):
        yield not name.startswith("XLA int4"), name, run, made
    widths = {
        "4 bits": {4: c},
        "mixed": {bits: round(share * c) for bits, share in ahead_of_time.MIXED.items()},
        "2 bits": {2: c},
        "8 bits": {8: c},
        "4 bits, groups of 128": {4: c},
    }
    for name, rows in itertools.islice(widths.items(), 1 if small else None):
        group = 128 if "groups" in name else None
        made = functools.partial(random_weight, ahead_of_time.shapes(c, k, rows, group))
        for bits, kind in ((16, "bfloat16"), (8, "int8")):
            run = functools.partial(kernels.mixed_matmul, activation_bits=bits)
            yield bits == 16 and name in ("4 bits", "mixed"), f"packed {name}, {kind}", run, made


def chunks(small: bool) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """One chunk of a full-size OpenVLA-OFT with random weights, in bfloat16 and packed."""
    name = "tiny-test" if small else "openvla-oft-7b"
    for packed in (False, True):
        yield {}, functools.partial(chunk, name, packed)


def chunk(name: str, packed: bool) -> dict[str, Any]:
    """Milliseconds of a call of the policy, and bytes of its weights."""
    policy = random_policy(name, packed)
    observation = policy.fake_observation()
    batch = {
        key: [value] if isinstance(value, str) else value[None]
        for key, value in observation.items()
    }
    inputs = policy.prepare(batch)
    start = time.perf_counter()
    actions = policy.run(inputs)
    first = time.perf_counter() - start
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        policy.run(inputs)
        seconds.append(time.perf_counter() - start)
    found = {
        "finite": bool(np.isfinite(np.asarray(actions)).all()),
        "gigabytes": full_size.held_bytes(policy) / 1e9,
        "first_call_seconds": first,
        "milliseconds": 1e3 * statistics.median(seconds),
    }
    return {f"{name}, {'4 bits' if packed else 'bfloat16'}": found}


def random_policy(name: str, packed: bool) -> Policy:
    """A preset with random weights in bfloat16, made on the device; packed: 4-bit codes."""
    config = preset(name)
    model = abstract_model(config, dtype=jnp.bfloat16)
    drop_unread(model)
    keys = map(jax.random.key, itertools.count())
    if packed:
        linears, found = named_modules(model, nnx.Linear), {}
        for path in quantizable_layers(model, layout(config).rules):
            k, c = linears[path].kernel.shape
            shapes = ahead_of_time.shapes(c, k, {4: c}, None)
            arrays = PackedArrays(random_weight(shapes, next(keys)))
            found[path] = PackedLinear(shapes, joined=arrays)
        replace_modules(model, found)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        ones = path[-1] in ("scale", "scale_factor")
        variable.set_value(numbers(next(keys), variable.shape, 0.0 if ones else 0.02, float(ones)))
    limits = {"q01": [-1.0] * config.action_dim, "q99": [1.0] * config.action_dim}
    proprio = {"q01": [-1.0] * config.proprio_dim, "q99": [1.0] * config.proprio_dim}
    known = {config.unnorm_key or "random": {"action": limits, "proprio": proprio}}
    return make_policy(config, model, word_files(), known, source=name)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def numbers(key: jax.Array, shape: tuple[int, ...], spread: float, mean: float) -> jax.Array:
    """Random bfloat16."""
    return spread * jax.random.normal(key, shape, jnp.bfloat16) + jnp.bfloat16(mean)


def main() -> int:
    """Writes JSON; returns 1 if a proof failed or a step did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400, help="no step begins later")
    parser.add_argument("--small", action="store_true", help="few small cases, for any device")
    arguments = parser.parse_args()
    report = Report(arguments.out, arguments.seconds)
    device = jax.devices()[0]
    report.add(
        "device",
        {
            "kind": device.device_kind,
            "jax": jax.__version__,
            "python": sys.version.split()[0],
            "capability": str(getattr(device, "compute_capability", "none")),
            "small": arguments.small,
            "preferred": kernels.prepare(
                kernels.pack(np.eye(32, 64), np.full(32, 4))
            ).implementation,
        },
    )
    report.steps("proofs", products(arguments.small))
    # A third of the time is kept for whole chunks.
    stop = report.stop
    report.stop = stop - arguments.seconds / 3
    report.steps("times", measurements(arguments.small))
    report.stop = stop
    report.steps("chunk", chunks(arguments.small))
    lines = [*report.found["proofs"], *report.found["times"], report.found["chunk"]]
    wrong = [line for line in lines if "failed" in line or line.get("ok") is False]
    print(f"{len(wrong)} of {len(lines)} steps failed: {arguments.out}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
