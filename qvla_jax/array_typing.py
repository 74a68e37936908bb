"""Array annotations, and the legend of the letters in them.

Shapes, wherever they are written (annotations, docstrings, error messages), use these letters:

    b  batch                     c  output channel        h  action horizon (length of a chunk)
    t  tokens                    k  fan-in                a  action dimension
    n  bit options               C  channels of a model   e  episode
    s  probe vectors             v  cameras               d  devices

Weights are `[c, k]` in documents and files; Flax kernels are `[k, c]`. Images are uint8 with the
channels last until the processor turns them into what a tower takes. Actions are either
*normalized* (quantiles mapped to [-1, 1], gripper in [0, 1]) or *metric* (un-normalized); the names
of functions and metrics say which.
"""

from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int8, Int32, Int64, Integer, PyTree, UInt8

Array: TypeAlias = jax.Array
NpArray: TypeAlias = np.ndarray
AnyArray: TypeAlias = jax.Array | np.ndarray

__all__ = [
    "AnyArray",
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Float64",
    "Int",
    "Int8",
    "Int32",
    "Int64",
    "Integer",
    "NpArray",
    "PyTree",
    "UInt8",
]
