"""The Pallas kernels compile for accelerators that are not there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def compiler(package, extra):
    try:
        missing = importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # of the package above it
        missing = True
    return pytest.mark.skipif(missing, reason=f"no {package}: install the extra {extra}")


TPU = [pytest.mark.tpu, compiler("libtpu", "aot-tpu")]
GPU = [pytest.mark.gpu, compiler("jax_plugins.xla_cuda13", "aot-gpu")]


def run(script, *arguments):
    # A process of its own: a compiler that JAX has loaded stays, and settings come before it.
    result = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=TPU) for name in ("v5e", "v5p", "v6e")]
    + [pytest.param(name, marks=GPU) for name in ("h100", "a100", "b200")],
)
def test_kernels_compile(target):
    result = run("ahead_of_time.py", target, "--shape", "700x1100", "--rows", "3")
    # Mixed widths and groups, each with bfloat16 and with int8 activations.
    assert result.stdout.count(f"| {target} |") == 4
    # And dealt over the chips of a host.
    dealt = 4 if target in ("v5e", "v5p", "v6e") else 0
    assert result.stdout.count(f"| {target}, ") == dealt


@pytest.mark.parametrize("target", [pytest.param("v6e-4", marks=TPU)])
def test_the_call_of_a_policy_compiles(target):
    # In the arithmetic of the package, and an observation for each chip.
    options = ["--policy", "tiny-test", "--weights", "mixed", "--whole", "--arithmetic", "float32"]
    result = run("whole_policy.py", target, *options)
    assert result.stdout.splitlines()[-1].count("MiB") == 2
