"""The Pallas kernels, interpreted: many tiles and blocks, groups, gradients."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.kernels import pallas_gpu

from .weights import pack_codes, random_weight

each_kernel = pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])


def make(group):
    """700 channels, so that several tiles have each width and outputs come from far apart."""
    c, k = 700, 1100
    rng = np.random.default_rng(0)
    bits = rng.choice([0, 2, 3, 4, 8, 16], c, p=[0.1, 0.3, 0.1, 0.3, 0.1, 0.1])
    bits[300:450] = 4  # whole vectors of outputs that lie in one run
    source = random_weight(c, k, 0, ml_dtypes.bfloat16)
    bias = rng.normal(size=c).astype(np.float32)
    # Any codes will do; those of four widths at once would take long to find.
    codes = 2 * rng.integers(-2, 2, (c, k)) + 1
    groups = 1 if group is None else -(-k // group)
    scales = (2.0 ** rng.integers(-8, -4, (c, groups))).astype(np.float32)
    return pack_codes(source, bits, codes, scales, group, bias=bias, source_dtype="bfloat16")


# Without groups, with groups within planes, and with groups of whole planes.
@each_kernel
@pytest.mark.parametrize(
    ("group", "activation_bits", "dtype"),
    [(None, 8, jnp.bfloat16), (48, 16, jnp.float32), (384, 8, jnp.float32)],
)
def test_many_tiles_agree_with_the_reference(implementation, group, activation_bits, dtype):
    weight = make(group)
    x = jax.random.normal(jax.random.key(0), (3, 1100), dtype)
    found = kernels.mixed_matmul(x, weight, activation_bits, implementation)
    expected = kernels.mixed_matmul(x, weight, activation_bits, "reference")
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    norms = np.linalg.norm(kernels.dequantize(weight), axis=1)
    allowed = 1e-5 * norms * np.sqrt(1100) + 1e-5
    if dtype == jnp.bfloat16:  # both were rounded
        allowed = allowed + np.abs(expected) * 2.0**-7
    assert (np.abs(found - expected) <= allowed).all()


@each_kernel
def test_16_bit_rows_must_be_bfloat16(implementation):
    w = kernels.pack(random_weight(4, 8, 0), np.full(4, 16), source_dtype="float32")
    with pytest.raises(InputError, match="must be bfloat16, not float32"):
        kernels.prepare(w, implementation)


def test_without_tritons_backend_the_gpu_kernel_says_so(monkeypatch):
    w = kernels.pack(random_weight(8, 16, 0), np.full(8, 4))
    monkeypatch.setattr(pallas_gpu, "plgpu", None)
    with pytest.raises(InputError, match="has no Triton backend"):
        kernels.prepare(w, "pallas_gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernels.prepare(w).implementation == "reference"
