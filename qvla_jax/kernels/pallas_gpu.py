"""The kernel for NVIDIA GPUs: Pallas for Mosaic GPU, one launch for all bit-widths of a weight.

The product of words and x is in `kernels.gpu_kernels`: `direct` for few rows, and for GPUs without
Hopper's tensor cores; `streamed` for many rows on Hopper. If there is too little work for the
device, several units share the inputs of a tile. The rest of the product is elementwise, and XLA
fuses it: sums over the units of a tile, scales, the gather that brings sums into the order of the
outputs, and the bias.

bfloat16 activations are multiplied by the codes in bfloat16, which holds both exactly, with sums in
float32. Integer activations are multiplied in bfloat16, too. A float32 row is the exact sum of
three bfloat16 rows. Groups scale the sums of their inputs.

Without a GPU the kernel is interpreted, which is slow and only for tests.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax

from qvla_jax.array_typing import Array, Float
from qvla_jax.kernels import fragments, gpu_kernels, tiles
from qvla_jax.kernels.activations import quantize_activations
from qvla_jax.kernels.batching import over_rows
from qvla_jax.kernels.gpu_kernels import Launch, Work
from qvla_jax.kernels.packed import PackedWeight
from qvla_jax.kernels.tiles import PlacedWeight
from qvla_jax.quantization.codes import SOURCE

# Units that run at once: two on each of the 132 processors of an H100.
UNITS: Final = 264
# Most rows of x of a unit, whose sums are in registers, with words in registers alone and with TMA.
_MOST_DIRECT: Final = 64
_MOST_STREAMED: Final = 128
# Up to so many rows `direct` waits for memory alone.
_FEW: Final = 16
# Unpacking for a unit takes about as long as the products of so many rows.
_OVERHEAD: Final = 24


def supports(w: PackedWeight) -> str | None:
    """Why this implementation cannot run the weight; None if it can."""
    capability = _capability()
    if capability is not None and capability < (9, 0):
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]}; it takes 8.0"
        # Its lowering begins every kernel with instructions of Hopper's.
        if jax.__version_info__ < (0, 11):
            return f"JAX {jax.__version__} has Mosaic GPU for Hopper and later; 0.11 has it for all"
    return tiles.unsupported(w)


def prepare(w: PackedWeight) -> PlacedWeight:
    """Arranges a weight in tiles; numpy arrays stay numpy arrays."""
    tiled = tiles.arrange(w, fragments.DEPTH, fragments.LANES, blocked=fragments.blocked)
    return PlacedWeight(tiled, tiles.positions(tiled, w.shape[0]), "pallas_gpu")


def canonical(w: PlacedWeight) -> PackedWeight:
    """The inverse of `prepare`, exactly."""
    return tiles.restore(w.tiled, fragments.unblocked)


def matmul(x: Float[Array, "*m k"], w: PlacedWeight, activation_bits: int) -> Float[Array, "*m c"]:
    """See `reference`; x is bfloat16 or float32."""
    run = functools.partial(_rows, activation_bits=activation_bits)
    return over_rows(run)(x, w)


def _device() -> Any:
    """The device that a kernel is traced for."""
    described: Any = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if described is None else described


def _capability() -> tuple[int, int] | None:
    """The compute capability of the GPU that is there; None without one."""
    if jax.default_backend() != "gpu":
        return None
    major, minor = str(_device().compute_capability).split(".")
    return int(major), int(minor)


def is_hopper() -> bool:
    """Whether kernels are traced for a GPU with `wgmma`."""
    names = _device().device_kind.split()
    return not {"H20", "H100", "H200", "H800", "GH200"}.isdisjoint(names)


def division(w: tiles.TiledWeight, rows: int, exact: bool, exceptions: int) -> tuple[Launch, bool]:
    """How a product is divided among units, and whether it is `streamed`.

    Args:
        w: the weight.
        rows: rows of x.
        exact: whether sums must have all the bits of float32.
        exceptions: the operand that multiplies rows of 16 bits.
    """
    step = w.scale_step
    # One row of scales serves the 64 inputs that TMA brings at a time.
    streamed = is_hopper() and rows > _FEW and (step is None or step % fragments.RUN == 0)
    count = sum(part.tiles(w.lanes) for part in w.parts)
    n = _rows_of_unit(rows, count, _MOST_STREAMED if streamed else _MOST_DIRECT)
    passes = -(-rows // n)
    blocks = [-(-w.shape[1] // tiles.covered(part.bits, w.depth)) for part in w.parts]
    # Blocks have the same bytes, which memory delivers; inputs of a tile, the same products.
    each = -(
        -passes * sum(p.tiles(w.lanes) * b for p, b in zip(w.parts, blocks, strict=True)) // UNITS
    )
    shares = max(UNITS // (passes * count), 1)
    works, tile, block = [], 0, 0
    for part, own in zip(w.parts, blocks, strict=True):
        parts = min(shares if streamed else -(-own // each), own)
        works.append(
            Work(
                bits=part.bits,
                codes=w.code_map(part.bits),
                tiles=part.tiles(w.lanes),
                blocks=own,
                each=-(-own // parts),
                first_tile=tile,
                first_block=block,
                operand=exceptions if part.bits == SOURCE else 0,
            )
        )
        tile, block = tile + works[-1].tiles, block + works[-1].tiles * own
    return Launch(tuple(works), n, step, not exact and rows <= _FEW), streamed


def _rows_of_unit(rows: int, tiles: int, most: int) -> int:
    """Rows of a unit, whole instructions: those that take the device least time."""

    def cost(n: int) -> tuple[float, int]:
        units = tiles * -(-rows // n)
        shares = max(UNITS // units, 1)
        return -(-units * shares // UNITS) * (n + _OVERHEAD) / shares, n

    size = fragments.COLUMNS
    return min(range(size, min(-(-rows // size) * size, most) + 1, size), key=cost)


def _rows(x: Float[Array, "m k"], w: PlacedWeight, activation_bits: int) -> Float[Array, "m c"]:
    (m, k), tiled = x.shape, w.tiled
    bias = jnp.asarray(tiled.bias)[None]
    if not tiled.segments or not m:
        return jnp.broadcast_to(bias, (m, w.shape[0])).astype(x.dtype)
    operands, scale = [_pieces(x)], None
    if activation_bits != 16:
        codes, scale = quantize_activations(x, activation_bits)
        operands = [codes.astype(jnp.bfloat16), x.astype(jnp.bfloat16)]
    rows = operands[0].shape[0]
    launch, streamed = division(tiled, rows, rows > m, len(operands) - 1)
    operands = operands[: 1 + max(work.operand for work in launch.works)]
    padding = ((0, -rows % launch.rows), (0, tiled.padded_k - k))
    operands = [jnp.pad(operand, padding) for operand in operands]

    def product(operands: list[Array], words: Array, scales: Array, *, interpret: bool) -> Array:
        # Barriers are interpreted by callbacks, which would order a program on every platform.
        if streamed and not interpret:
            return gpu_kernels.streamed(launch, operands, words, scales, interpret=False)
        columns = [fragments.columns(operand) for operand in operands]
        return gpu_kernels.direct(launch, columns, words, scales, interpret=interpret)

    sums = lax.platform_dependent(
        operands,
        tiled.words,
        tiled.scales,
        cuda=functools.partial(product, interpret=False),
        default=functools.partial(product, interpret=True),
    )
    y = _joined(sums[..., :rows], launch.works, tiled, scale, m)
    position = jnp.asarray(w.position)
    y = jnp.where(position[:, None] < 0, 0.0, y[jnp.maximum(position, 0)])
    return (y.T + bias).astype(x.dtype)


def _pieces(x: Float[Array, "m k"]) -> Float[Array, "n k"]:
    """Rows in bfloat16; float32 rows as three, whose sum they are."""
    if x.dtype == jnp.bfloat16:
        return x
    pieces = []
    for _ in range(3):
        # Rounding that XLA may not leave out.
        pieces.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - pieces[-1]
    return jnp.concatenate(pieces).astype(jnp.bfloat16)


def _joined(
    sums: Float[Array, "units n rows"],
    works: tuple[Work, ...],
    w: tiles.TiledWeight,
    scale: Float[Array, "m 1"] | None,
    m: int,
) -> Float[Array, "lanes m"]:
    """Sums over units and over pieces of the m rows of x, with scales."""
    found, unit = [], 0
    for work in works:
        own = sums[unit : unit + work.units].reshape(work.tiles, work.shares, w.lanes, -1).sum(1)
        own = own.reshape(work.tiles * w.lanes, -1, m).sum(1)
        if w.group is None:
            lanes = slice(work.first_tile * w.lanes, (work.first_tile + work.tiles) * w.lanes)
            own = own * jnp.asarray(w.scales)[0, lanes, None].astype(jnp.float32)
        # Rows of 16 bits multiply x itself.
        found.append(own if scale is None or work.bits == SOURCE else own * scale.T)
        unit += work.units
    return jnp.concatenate(found)
