"""The CPU kernel: its arrangement, its threads, its instruction sets, and what it does without."""

import dataclasses
import mmap
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qvla_jax import kernels
from qvla_jax.errors import InputError
from qvla_jax.kernels import cpu

from .weights import pack_codes, packed_weights, random_bits, random_weight

needs_kernel = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernel")


def make(c=150, k=300, group=None, seed=0, source="bfloat16"):
    bits = random_bits(c, seed)
    bias = np.random.default_rng(seed).normal(size=c).astype(np.float32)
    weight = random_weight(c, k, seed, jnp.dtype(source))
    return kernels.pack(weight, bits, group, bias=bias, source_dtype=source)


@settings(deadline=None, max_examples=30)
@given(packed_weights())
def test_the_arrangement_is_inverted_exactly(weight):
    w = weight[0]
    again = cpu.canonical(cpu.prepare(w))
    assert jax.tree.structure(again) == jax.tree.structure(w)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_words_of_whole_pages_stay_where_they_were_arranged():
    # 130 tiles of 16 KiB: one page of 2 MiB and some of the next.
    c, k = 2080, 2048
    codes = np.random.default_rng(0).integers(-7, 8, (c, k))
    w = pack_codes(np.ones((c, k), np.float32), np.full(c, 4), codes, np.ones((c, 1)))
    prepared = cpu.prepare(w)
    assert prepared.words.nbytes == c * k // 2
    np.testing.assert_array_equal(cpu.canonical(prepared).words[0], w.words[0])
    (placed,) = jax.device_put([prepared.words])
    assert placed.unsafe_buffer_pointer() == prepared.words.ctypes.data
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert prepared.words.ctypes.data % 2**21 == 0


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
def test_the_arrangement_of_traced_weights_is_the_same(source):
    w = make(source=source)
    traced, host = jax.jit(cpu.prepare)(w), cpu.prepare(w)
    for found, expected in zip(jax.tree.leaves(traced), jax.tree.leaves(host), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(
        jax.tree.leaves(jax.jit(cpu.canonical)(host)), jax.tree.leaves(w), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@needs_kernel
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("rows", [1, 7, 70, 230])
def test_any_number_of_threads_gives_the_same_bits(rows, activation_bits):
    w = cpu.prepare(make(group=64))
    x = jax.random.normal(jax.random.key(0), (rows, 300))
    one = cpu.matmul(x, w, activation_bits, max_threads=1)
    for threads in (2, 3, 0):
        again = cpu.matmul(x, w, activation_bits, max_threads=threads)
        np.testing.assert_array_equal(one, again)


@needs_kernel
def test_rows_do_not_depend_on_each_other_beyond_rounding():
    w = cpu.prepare(make())
    x = jax.random.normal(jax.random.key(0), (40, 300))
    for bits in (16, 8):
        whole = cpu.matmul(x, w, bits)
        single = jnp.concatenate([cpu.matmul(x[i : i + 1], w, bits) for i in range(40)])
        np.testing.assert_allclose(whole, single, rtol=1e-4, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("activation_bits", [16, 8, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_show(activation_bits, bad):
    w = make()
    x = np.random.default_rng(0).normal(size=(30, 300)).astype(np.float32)
    x[4, 7] = bad
    y = np.asarray(cpu.matmul(jnp.asarray(x), cpu.prepare(w), activation_bits))
    stored = w.bits() > 0
    assert not np.isfinite(y[4, stored]).any()
    assert np.isfinite(np.delete(y, 4, axis=0)).all()


@needs_kernel
def test_calls_run_side_by_side():
    weights = [cpu.prepare(make(seed=i)) for i in range(6)]
    x = jax.random.normal(jax.random.key(0), (64, 300))
    together = jax.jit(lambda x: [cpu.matmul(x, w, 16) for w in weights])
    expected = [np.asarray(cpu.matmul(x, w, 16)) for w in weights]
    for _ in range(20):
        for found, want in zip(together(x), expected, strict=True):
            np.testing.assert_array_equal(found, want)


@needs_kernel
def test_operands_that_do_not_fit_are_refused_by_the_kernel():
    w = cpu.prepare(make())
    x = jnp.ones((2, 300))
    for change in (
        {"words": w.words[:-1]},
        {"scales": w.scales[:-16]},
        {"index": w.index + 1000},
        {"pruned": w.pruned - 1000},
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="qvla_matmul"):
            jax.block_until_ready(cpu.matmul(x, dataclasses.replace(w, **change), 16))


LOWER = """
import pickle, sys
from pathlib import Path
import numpy as np
from qvla_jax import kernels
from qvla_jax.kernels import cpu
assert cpu.instruction_set() == {name!r}, cpu.instruction_set()
for w, x, activation_bits, expected in pickle.loads(Path(sys.argv[1]).read_bytes()):
    found = kernels.mixed_matmul(x, w, activation_bits, "cpu")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
"""


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """A file of weights, activations, their widths, and the products by the reference."""
    rng, found = np.random.default_rng(0), []
    reference = jax.jit(kernels.mixed_matmul, static_argnums=(2, 3))
    for group, source in ((None, np.float32), (48, jnp.bfloat16)):
        weight = rng.normal(size=(70, 131)).astype(source)
        w = kernels.pack(weight, rng.choice([0, 2, 3, 4, 8, 16], 70), group)
        for rows in (1, 3, 30):
            x = rng.normal(size=(rows, 131)).astype(np.float32)
            for activation_bits in (16, 8):
                expected = reference(x, w, activation_bits, "reference")
                found.append((w, x, activation_bits, np.asarray(expected)))
    path = tmp_path_factory.mktemp("products") / "products.pickle"
    path.write_bytes(pickle.dumps(found))
    return path


# Every processor runs the rest of a list from one of its entries on.
INSTRUCTION_SETS = (
    ("avx512_bf16", "avx512", "avx2", "portable"),
    ("avx2_vnni", "avx2", "portable"),
    ("neon_bf16", "neon_dot", "neon", "portable"),
)


@needs_kernel
@pytest.mark.parametrize("name", ["avx512", "avx2", "neon_dot", "neon", "portable"])
def test_lower_instruction_sets(name, products):
    best = cpu.instruction_set()
    if not any(name in names[names.index(best) :] for names in INSTRUCTION_SETS if best in names):
        pytest.skip(f"a processor with {best} does not run {name}")
    result = subprocess.run(
        [sys.executable, "-c", LOWER.format(name=name), str(products)],
        env={**os.environ, "QVLA_CPU_KERNEL": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_without_a_compiled_kernel_the_reference_runs_after_one_warning(monkeypatch):
    def missing(path):
        raise OSError(f"{path}: cannot open shared object file")

    cpu.library.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", missing)
    try:
        w = make()
        with pytest.warns(UserWarning, match="without its CPU kernel") as caught:
            prepared = kernels.prepare(w)
        assert len(caught) == 1
        # No second one: a warning would be an error here.
        assert kernels.prepare(w).implementation == prepared.implementation == "reference"
        assert cpu.instruction_set() is None
        with pytest.raises(InputError, match="implementation 'cpu': the package was installed"):
            kernels.prepare(w, "cpu")
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()
