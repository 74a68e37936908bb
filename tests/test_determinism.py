"""The same seed in other processes, and on one and on eight devices: table, bits, packed file.

Exact costs are compared in sensitivity/test_sweep.py.

    test_determinism.py FOLDER DEVICES

as a script makes them in a folder.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

METHODS = ("jacobian",)
BUDGET = 10.0


def make(folder: Path) -> None:
    """Table, allocation and packed policy of the smallest preset, by each method."""
    import qvla_jax
    from qvla_jax.inference import random_policy
    from qvla_jax.sensitivity import sensitivities

    policy = random_policy("tiny-test", seed=0)
    frames = qvla_jax.calibration_set("bundled", frames=4, seed=0)
    for method in METHODS:
        table = sensitivities(
            policy, frames, method=method, bits=(0, 2, 4, 8, 16), probes=1, batch=4, joint=False
        )
        table.save(folder / f"{method}.safetensors")
        allocation = qvla_jax.allocate(table, budget_bits=BUDGET)
        np.save(folder / f"{method}.npy", allocation.bits)
        qvla_jax.quantize(policy, allocation).save(folder / f"{method}.qvla")


@pytest.mark.long
def test_one_and_eight_devices_and_two_processes_make_the_same_files(tmp_path):
    from qvla_jax.sensitivity import SensitivityTable

    runs = {"one": 1, "eight": 8, "again": 8}
    for name, devices in runs.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, __file__, str(tmp_path / name), str(devices)]
        subprocess.run(command, check=True, timeout=900)

    def content(run: str, file: str) -> bytes:
        return (tmp_path / run / file).read_bytes()

    for method in METHODS:
        for file in (f"{method}.safetensors", f"{method}.npy", f"{method}.qvla"):
            assert content("again", file) == content("eight", file), file
        one, eight = (
            SensitivityTable.load(tmp_path / run / f"{method}.safetensors")
            for run in ("one", "eight")
        )
        # Sums over more devices are taken in another order.
        np.testing.assert_allclose(eight.costs, one.costs, rtol=1e-5, atol=1e-12)
        np.testing.assert_array_equal(eight.sizes, one.sizes)
        for file in (f"{method}.npy", f"{method}.qvla"):
            assert content("one", file) == content("eight", file), file


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    make(Path(sys.argv[1]))
