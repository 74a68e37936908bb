"""Error feedback: each weight's rounding error moves into the weights that are not rounded yet.

A row w quantized to w_hat = w + d changes the output by d x, and over inputs with covariance H the
mean square of that is d H d^T. Rounding to nearest keeps each entry of d small; error feedback
(GPTQ, Frantar et al. 2023, arXiv 2210.17323) keeps d H d^T small. With U the upper Cholesky factor
of (H + damping mean(diag H) I)^-1, inputs are rounded in order of decreasing variance:

    q_j = nearest code of w_j / s,     e = (w_j - s q_j) / U[j, j],     w_i -= e U[j, i] for i > j.

Rows do not depend on each other, so all rows of a layer, at all their bit-widths, go through one
scan; updates beyond a block of inputs wait for the end of the block and are one matrix product.
"""

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from qvla_jax.array_typing import Array, Float, Int, Int8
from qvla_jax.quantization.grid import nearest_code

_BLOCK: Final = 64


def feedback_factor(
    covariance: Float[np.ndarray, "k k"], damping: float
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, "k k"]]:
    """Order of the inputs, and U in that order; float64 inside, float32 out.

    Args:
        covariance: H, symmetric and positive semidefinite, but for what rounding left of it. A
            matrix of zeros gives a U that feeds nothing back.
        damping: share of the mean variance that is added to every variance.
    """
    matrix = np.asarray(covariance, np.float64)
    size, level = len(matrix), float(np.mean(np.diagonal(matrix)))
    if not level > 0:
        return np.arange(size), np.eye(size, dtype=np.float32)
    order = np.argsort(-np.diagonal(matrix), kind="stable")
    damped = matrix[np.ix_(order, order)] / level + damping * np.eye(size)
    try:
        lower = scipy.linalg.cholesky(damped, lower=True)
    except np.linalg.LinAlgError:
        # Inputs that hardly vary around a large mean: rounding left negative variances.
        variances, axes = np.linalg.eigh(damped)
        lower = scipy.linalg.cholesky((axes * np.maximum(variances, damping)) @ axes.T, lower=True)
    inverse = scipy.linalg.cho_solve((lower, True), np.eye(size))
    factor = scipy.linalg.cholesky((inverse + inverse.T) / 2, lower=False)
    return order, factor.astype(np.float32)


@functools.partial(jax.jit, static_argnames="block")
def feedback_rows(
    weight: Float[Array, "c k"],
    scale: Float[Array, "c 1"],
    levels: Float[Array, "4 c"],
    order: Int[Array, " k"],
    factor: Float[Array, "k k"],
    *,
    block: int = _BLOCK,
) -> Int8[Array, "c k"]:
    """Codes q of every row by error feedback.

    Args:
        weight: rows.
        scale: s of each row.
        levels: lowest code, highest code, step and offset of each row (codes.levels).
        order: from `feedback_factor`.
        factor: from `feedback_factor`.
        block: inputs that are rounded between two matrix products.
    """
    rows, size = weight.shape
    block = min(block, size)
    extra = -size % block
    # Padded inputs come last, so they change nothing.
    work = jnp.pad(weight.astype(jnp.float32)[:, order], ((0, 0), (0, extra)))
    factor = jnp.pad(factor, ((0, extra), (0, extra)))
    tail = jnp.arange(size + extra) >= size
    factor = factor + jnp.diag(tail.astype(jnp.float32))
    step_scale = scale[:, 0]

    def of_block(work: Array, start: Array) -> tuple[Array, Array]:
        strip = jax.lax.dynamic_slice(factor, (start, 0), (block, size + extra))
        local = jax.lax.dynamic_slice(strip, (0, start), (block, block))
        part = jax.lax.dynamic_slice(work, (0, start), (rows, block))

        def of_input(part: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            w = part[:, i]
            code = nearest_code(w / step_scale, *levels)
            error = (w - step_scale * code) / local[i, i]
            # The factor is triangular: inputs before i do not change.
            return part - error[:, None] * local[i][None], (code.astype(jnp.int8), error)

        _, (codes, errors) = jax.lax.scan(of_input, part, jnp.arange(block))
        update = jnp.matmul(errors.T, strip, precision=jax.lax.Precision.HIGHEST)
        return work - update, codes

    _, codes = jax.lax.scan(of_block, work, jnp.arange(0, size + extra, block))
    in_order = codes.reshape(size + extra, rows)[:size].T
    return jnp.zeros_like(in_order).at[:, order].set(in_order)
