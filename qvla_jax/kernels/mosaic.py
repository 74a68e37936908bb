"""The instructions of the GPU kernel that Pallas has no operations for, each with its twin.

`Device` has them for Mosaic GPU, `Twin` in operations of JAX on the same matrices: kernels are
interpreted with twins. What an instruction does to registers, Mosaic's layouts say: `WG_STRIDED`
deals adjacent words to threads, `WGMMA` is the tensor cores' own order (see `kernels.fragments`).
"""

import importlib
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from qvla_jax.array_typing import Array, Float, Int32
from qvla_jax.kernels import fragments

# How rows of x lie in shared memory for `wgmma`.
TRANSFORMS: Final = (
    plgpu.TilingTransform((fragments.COLUMNS, fragments.RUN)),
    plgpu.SwizzleTransform(128),
)
# Mosaic passes a context as well, which type checkers miss.
_inline: Any = plgpu.inline_mgpu
_MMA: Final = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
)


def interpretation() -> Any:
    """What has threads, barriers and copies of a kernel interpreted."""
    found = getattr(plgpu, "InterpretGPUParams", None)
    if found is None:  # JAX 0.10 does not export it
        module = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
        found = module.InterpretGPUParams
    return found()


class Twin:
    """In operations of JAX."""

    @staticmethod
    def constant(bits: int, value: int) -> Int32[Array, "bits lanes"]:
        """An array like a run's words, filled with any 32 bits."""
        return lax.full((bits, fragments.LANES), np.uint32(value).view(np.int32))

    @staticmethod
    def words(held: Any, run: int, bits: int) -> Int32[Array, "bits lanes"]:
        """The words of a run, from those of a block, or of a part of it, for a warpgroup."""
        return held[pl.ds(run * bits, bits)]

    @staticmethod
    def matrix(found: fragments.Pairs, bits: int) -> Float[Array, "rows run"]:
        """See `fragments.matrix`."""
        return fragments.matrix(found, bits)

    @staticmethod
    def zeros(n: int) -> Float[Array, "rows n"]:
        """Sums to begin with."""
        return lax.full((fragments.ROWS, n), np.float32(0))

    @staticmethod
    def mma(
        sums: Array,
        matrix: Array,
        x: Any,
        run: int,
        steps: range,
        above: Float[np.ndarray, " run"] | None,
    ) -> Float[Array, "rows n"]:
        """Adds the products of some steps of a run.

        Args:
            sums: of 64 channels, for n rows of x.
            matrix: of the run.
            x: runs of `fragments.columns`, n / 8 tiles.
            run: which of these.
            steps: which of the run.
            above: what all channels of the matrix have too much, input by input.
        """
        here = slice(steps.start * fragments.STEP, steps.stop * fragments.STEP)
        rows = fragments.restored_columns(x[run])[:, here]
        sums = sums + _dot(matrix[:, here], rows)
        if above is None:
            return sums
        pairs = [fragments.pair_bits((a, b)) for a, b in above[here].reshape(-1, 2).tolist()]
        same = lax.concatenate([_pair(bits) for bits in pairs], 1)
        return sums - _dot(same, rows)

    @staticmethod
    def wgmma(sums: Array, matrices: Sequence[Array], xs: Sequence[Any]) -> Float[Array, "rows n"]:
        """Adds the products of runs, whose n rows of x lie in shared memory."""
        for matrix, x in zip(matrices, xs, strict=True):
            sums = sums + _dot(matrix, x[...])
        return sums

    @staticmethod
    def scales(held: Any) -> Float[Array, " rows"]:
        """Scales of 64 channels in float32."""
        return held[...].astype(jnp.float32)

    @staticmethod
    def store(sums: Array, y: Any) -> None:
        """Writes sums to global memory."""
        y[...] = sums


def _dot(matrix: Array, rows: Array) -> Array:
    contracted = (((1,), (1,)), ((), ()))
    return lax.dot_general(matrix, rows, contracted, preferred_element_type=jnp.float32)


def _pair(bits: int) -> Array:
    words = lax.full((fragments.ROWS, 1), np.uint32(bits).view(np.int32))
    return lax.bitcast_convert_type(words, jnp.bfloat16).reshape(fragments.ROWS, 2)


class Device:
    """For Mosaic GPU."""

    @staticmethod
    def constant(bits: int, value: int) -> Int32[Array, "bits lanes"]:
        """See `Twin`."""
        layout = _strided(bits)

        @_inline(return_type=_shape((bits, fragments.LANES), jnp.int32, layout))
        def make(context: Any) -> Any:
            del context
            strided = layout.to_mgpu()
            registers = np.empty(strided.registers_shape(strided.shape), object)
            kind = ir.VectorType.get((strided.vec_size,), _i32())
            registers[...] = vector.broadcast(kind, _kept(value))
            return mgpu.FragmentedArray(_registers=registers, _layout=strided, _is_signed=True)

        return make()

    @staticmethod
    def words(held: Any, run: int, bits: int) -> Int32[Array, "bits lanes"]:
        """See `Twin`."""
        layout = _strided(bits)

        @_inline(
            arg_types=(plgpu.RefType(),),
            return_type=_shape((bits, fragments.LANES), jnp.int32, layout),
        )
        def load(context: Any, held: Any) -> Any:
            del context
            own = mgpu.memref_slice(held, (slice(run * bits, (run + 1) * bits),))
            size = layout.to_mgpu().vec_size
            return mgpu.FragmentedArray.load_strided(own, is_signed=True, vec_size=size)

        return load(held)

    @staticmethod
    def matrix(found: fragments.Pairs, bits: int) -> Float[Array, "rows run"]:
        """See `Twin`."""
        count = len(found.registers)
        others = [above for above in found.above if isinstance(above, jax.Array)]
        size = (fragments.ROWS, fragments.RUN)

        @_inline(
            arg_types=([_strided(bits)] * (count + len(others)),),
            return_type=_shape(size, jnp.bfloat16, plgpu.Layout.WGMMA),
        )
        def view(context: Any, arrays: list[Any]) -> Any:
            del context
            pair = ir.VectorType.get((2,), ir.BF16Type.get())

            def number(field: int, group: int, word: int) -> Any:
                held = arrays[field].registers[group]
                one = vector.extract_strided_slice(
                    ir.VectorType.get((1,), _i32()), held, [word], [1], [1]
                )
                return vector.bitcast(pair, one)

            registers = np.empty((fragments.RUN // fragments.STEP, 2, 2), object)
            for step, eight, half in np.ndindex(*registers.shape):
                group, word, field = fragments.register(bits, step, eight, half)
                value, above = number(field, group, word), found.above[field]
                if isinstance(above, tuple):
                    value = arith.subf(value, _pair_constant(pair, above))
                elif above is not None:
                    value = arith.subf(value, number(count + field, group, word))
                registers[step, eight, half] = value
            layout = plgpu.Layout.WGMMA.to_mgpu()
            registers = registers.reshape(layout.registers_shape(size))
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return view([*found.registers, *others])

    @staticmethod
    def zeros(n: int) -> Float[Array, "rows n"]:
        """See `Twin`."""
        return plgpu.layout_cast(Twin.zeros(n), plgpu.Layout.WGMMA)

    @staticmethod
    def mma(
        sums: Array,
        matrix: Array,
        x: Any,
        run: int,
        steps: range,
        above: Float[np.ndarray, " run"] | None,
    ) -> Float[Array, "rows n"]:
        """See `Twin`."""
        n = sums.shape[1]

        @_inline(
            arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, plgpu.RefType()),
            return_type=_shape((fragments.ROWS, n), jnp.float32, plgpu.Layout.WGMMA),
        )
        def add(context: Any, sums: Any, matrix: Any, x: Any) -> Any:
            del context
            left = matrix.registers.reshape(-1, 2, 2)
            less = _less(above, steps)
            held = sums.registers.reshape(n // fragments.COLUMNS, 2)
            total = np.empty_like(held)
            for tile in range(len(held)):
                found = [_element(held[tile, half], i) for half in range(2) for i in range(2)]
                right = _loaded(x, run, tile)
                # Sums of their own, so that neither product waits for the other.
                other = [_zero()] * 4
                for step in steps:
                    own = right[2 * step : 2 * step + 2]
                    operand = [_bits(left[step, eight, half]) for eight, half in np.ndindex(2, 2)]
                    found = _mma(operand, own, found)
                    if less:
                        other = _mma(less[step], own, other)
                if less:
                    found = [arith.addf(a, b) for a, b in zip(found, other, strict=True)]
                for half in range(2):
                    total[tile, half] = _vector(found[2 * half : 2 * half + 2])
            total = total.reshape(sums.registers.shape)
            return mgpu.FragmentedArray(_registers=total, _layout=sums.layout, _is_signed=None)

        return add(sums, matrix, x)

    @staticmethod
    def wgmma(sums: Array, matrices: Sequence[Array], xs: Sequence[Any]) -> Float[Array, "rows n"]:
        """See `Twin`."""
        count = len(matrices)

        @_inline(
            arg_types=(
                plgpu.Layout.WGMMA,
                [plgpu.Layout.WGMMA] * count,
                [plgpu.RefType(TRANSFORMS)] * count,
            ),
            return_type=_shape(sums.shape, jnp.float32, plgpu.Layout.WGMMA),
        )
        def add(context: Any, sums: Any, matrices: list[Any], xs: list[Any]) -> Any:
            del context
            total = mgpu.WGMMAAccumulator.from_registers(sums)
            for matrix, x in zip(matrices, xs, strict=True):
                total = mgpu.wgmma(total, matrix, mgpu.memref_transpose(x, (1, 0, 3, 2)))
            nvvm.wgmma_commit_group_sync_aligned()
            nvvm.wgmma_wait_group_sync_aligned(0)
            return total.value

        return add(sums, list(matrices), list(xs))

    @staticmethod
    def scales(held: Any) -> Float[Array, " rows"]:
        """See `Twin`."""
        layout: Any = plgpu.Layout.WGMMA.reduce(1)

        @_inline(
            arg_types=(plgpu.RefType(),),
            return_type=_shape((fragments.ROWS,), jnp.bfloat16, layout),
        )
        def load(context: Any, held: Any) -> Any:
            del context
            return mgpu.FragmentedArray.load_untiled(
                held, layout=layout.to_mgpu(), swizzle=16, optimized=False
            )

        return load(held).astype(jnp.float32)

    @staticmethod
    def store(sums: Array, y: Any) -> None:
        """See `Twin`."""

        @_inline(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
        def write(context: Any, sums: Any, y: Any) -> None:
            del context
            sums.store_untiled(y, optimized=False)

        write(sums, y)


def _strided(bits: int) -> Any:
    shape = (bits, fragments.LANES)
    return plgpu.Layout.WG_STRIDED(shape, vec_size=fragments.vector(bits))


def _shape(shape: tuple[int, ...], dtype: Any, layout: Any) -> Any:
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _integer(value: int) -> Any:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value))


def _zero() -> Any:
    number = ir.F32Type.get()
    return arith.constant(number, ir.FloatAttr.get(number, 0.0))


def _kept(value: int, number: int = 0) -> Any:
    """A constant in a register of its own, one for each `number`.

    The assembler repeats what it knows to be constant before every instruction that has another
    constant already, and copies what is in several places. It does not know that the grid has one
    layer, so that this is `value`.
    """
    text = f"{{ .reg .b32 n; mov.u32 n, %ctaid.z; mad.lo.u32 $0, n, {number + 1}, {value}; }}"
    return llvm.inline_asm(_i32(), [], text, "=r", has_side_effects=False)


def _pair_constant(kind: Any, pair: tuple[float, float]) -> Any:
    numbers = [ir.FloatAttr.get(kind.element_type, number) for number in pair]
    return arith.constant(kind, ir.DenseElementsAttr.get(numbers, kind))


def _element(held: Any, number: int) -> Any:
    return llvm.extractelement(held, _integer(number))


def _bits(pair: Any) -> Any:
    return _element(vector.bitcast(ir.VectorType.get((1,), _i32()), pair), 0)


def _vector(numbers: Sequence[Any]) -> Any:
    held = llvm.mlir_undef(ir.VectorType.get((len(numbers),), ir.F32Type.get()))
    for number, value in enumerate(numbers):
        held = llvm.insertelement(held, value, position=_integer(number))
    return held


def _less(above: Float[np.ndarray, " run"] | None, steps: range) -> dict[int, list[Any]]:
    """Operands that have the same numbers for all channels, the negative of `above`."""
    if above is None:
        return {}
    pairs = (-above.astype(np.float32)).reshape(fragments.RUN // fragments.STEP, 2, 4, 2)
    return {
        step: [
            _kept(fragments.pair_bits(tuple(pairs[step, eight, 0])), 2 * eight + half)
            for eight, half in np.ndindex(2, 2)
        ]
        for step in steps
    }


def _loaded(x: Any, run: int, tile: int) -> list[Any]:
    """A thread's 8 words of a tile of `fragments.columns`."""
    x = mgpu.memref_slice(x, (run, tile))
    quad = ir.VectorType.get((4,), _i32())
    lane = arith.remui(mgpu.utils.thread_idx(), _integer(32))
    start = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(x))
    found = []
    for half in range(2):
        at = arith.addi(arith.muli(lane, _integer(2)), _integer(half))
        held = llvm.load(quad, mgpu.utils.getelementptr(start, [at], quad), alignment=16)
        found += [_element(held, number) for number in range(4)]
    return found


def _mma(left: Sequence[Any], right: Sequence[Any], sums: Sequence[Any]) -> list[Any]:
    number = ir.F32Type.get()
    found: Any = llvm.inline_asm(
        llvm.StructType.get_literal([number] * 4),
        [*left, *right, *sums],
        _MMA,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
    )
    return [llvm.extractvalue(number, found, [i]) for i in range(4)]
