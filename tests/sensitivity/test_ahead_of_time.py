"""The first-order step compiles for TPUs that are not there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sweep_ahead_of_time.py"


@pytest.mark.tpu
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is missing; the extra aot-tpu brings it",
)
def test_the_step_compiles_on_a_mesh_of_eight_chips():
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "v6e-8", "--preset", "tiny-test"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    row = result.stdout.splitlines()[-1]
    assert row.startswith("| v6e-8 | 1 x 8 | 4 |")
    assert row.count("GiB") == 3
