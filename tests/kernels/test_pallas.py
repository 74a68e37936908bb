"""The Pallas kernels, interpreted: many tiles and blocks, groups, gradients."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.kernels import gpu_kernels, pallas_gpu, pallas_triton

from .weights import pack_codes, random_weight

TRITON = jax.__version_info__ < (0, 11)
each_kernel = pytest.mark.parametrize(
    "implementation",
    [
        "pallas_tpu",
        "pallas_gpu",
        pytest.param(
            "pallas_triton",
            marks=pytest.mark.skipif(
                not TRITON, reason="JAX 0.11 deprecates Pallas's Triton backend"
            ),
        ),
    ],
)


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


def test_many_rows_on_hopper_go_through_shared_memory(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "is_hopper", lambda: True)
    monkeypatch.setattr(pallas_gpu, "UNITS", 1)  # one unit takes all steps, more than slots
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (20, 900))
    scales = (2.0 ** rng.integers(-8, -4, (20, 1))).astype(np.float32)
    w = pack_codes(np.zeros((20, 900), np.float32), np.full(20, 4), codes, scales)
    x = jax.random.normal(jax.random.key(0), (17, 900), jnp.bfloat16)
    tiled = kernels.prepare(w, "pallas_gpu").tiled
    launch, streamed = pallas_gpu.division(tiled, 17, False, 0)
    assert streamed
    assert launch.works[0].blocks == launch.works[0].each == 4
    padded = jnp.pad(x, ((0, -17 % launch.rows), (0, tiled.padded_k - 900)))
    sums = gpu_kernels.streamed(launch, [padded], tiled.words, tiled.scales, interpret=True)
    expected = codes.astype(np.float64) @ np.asarray(x, np.float64).T
    np.testing.assert_allclose(sums[0, :20, :17], expected, rtol=1e-5, atol=1e-3)
    # Compiled for other platforms, nothing of that interpreter is left.
    assert not jax.make_jaxpr(lambda x, w: kernels.mixed_matmul(x, w, 16))(
        x, kernels.prepare(w, "pallas_gpu")
    ).effects


def test_rows_of_a_unit_fill_the_device():
    # 32 tiles: eight passes of 80 rows are 256 units for 264 places; of 128 rows, 160.
    assert pallas_gpu._rows_of_unit(600, 32, 128) == 80
    assert pallas_gpu._rows_of_unit(5, 32, 128) == 8
    assert pallas_gpu._rows_of_unit(600, 32, 64) <= 64


def test_gpus_take_the_kernel_that_their_jax_can_lower(monkeypatch):
    w = kernels.pack(random_weight(8, 16, 0), np.full(8, 4))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pallas_gpu, "_capability", lambda: (9, 0))
    assert kernels.prepare(w).implementation == "pallas_gpu"
    monkeypatch.setattr(pallas_gpu, "_capability", lambda: (8, 0))
    assert kernels.prepare(w).implementation == ("pallas_triton" if TRITON else "pallas_gpu")
    if TRITON:
        with pytest.raises(InputError, match="Mosaic GPU for Hopper and later"):
            kernels.prepare(w, "pallas_gpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert kernels.prepare(w).implementation == "pallas_gpu"
    assert "deprecates" in pallas_triton.supports(w)
    monkeypatch.setattr(pallas_gpu, "_capability", lambda: (7, 5))
    assert kernels.prepare(w).implementation == "reference"
