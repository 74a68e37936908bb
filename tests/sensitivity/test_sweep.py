"""Sweeps that are killed and go on, and sweeps of several processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh

from qvla_jax.errors import InputError
from qvla_jax.sensitivity import SensitivityTable, SweepStore
from qvla_jax.solvers import solve

from .cluster import slurm_variables
from .sweep_process import sweep

# Sums over more devices are taken in another order.
TOLERANCES = {"exact": 0.0, "jacobian": 1e-6}
SCRIPT = Path(__file__).parent / "sweep_process.py"


def items_in(folder: Path) -> dict[Path, int]:
    """Finished items, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/[!.]*.npy")}


def start(*arguments: object, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_items(folder: Path, count: int, processes: list[subprocess.Popen]) -> None:
    while len(items_in(folder)) < count:
        assert all(process.poll() is None for process in processes), "ended before it was killed"
        time.sleep(0.01)


def test_a_killed_sweep_goes_on_and_ends_in_the_same_bytes(tmp_path, one_device):
    store = tmp_path / "store"
    process = start("exact", store, tmp_path, 2)
    wait_for_items(store, 3, [process])
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = items_in(store)

    def saved(folder: Path, name: str) -> bytes:
        table = sweep("exact", SweepStore(folder), one_device)["exact"]
        table.save(tmp_path / f"{name}.safetensors")
        return (tmp_path / f"{name}.safetensors").read_bytes()

    resumed = saved(store, "resumed")
    after = items_in(store)
    assert len(after) > len(before)
    assert before.items() <= after.items(), "finished items were computed again"
    assert resumed == saved(tmp_path / "another", "uninterrupted")


def check_tables(folder: Path, one_device: Mesh) -> None:
    """The saved tables are those of a sweep in this process."""
    expected = sweep("both", None, one_device)
    for method, tolerance in TOLERANCES.items():
        found = SensitivityTable.load(folder / f"{method}.safetensors")
        np.testing.assert_allclose(
            found.costs, expected[method].costs, rtol=tolerance, atol=tolerance * 1e-8
        )
        np.testing.assert_array_equal(found.sizes, expected[method].sizes)


@pytest.mark.long
def test_two_processes_one_of_them_killed_give_the_table_of_one_device(tmp_path, one_device):
    store, tables = tmp_path / "store", tmp_path / "tables"

    def start_both() -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        return [start("both", store, tables, 4, address, 2, number) for number in (0, 1)]

    both = start_both()
    wait_for_items(store, 1, both)
    os.kill(both[1].pid, signal.SIGKILL)
    # The other one cannot go on alone, and ends by itself.
    assert both[0].wait(timeout=900) != 0
    both[1].wait()
    before = items_in(store)
    assert not tables.exists()

    for process in start_both():
        assert process.wait(timeout=900) == 0
    assert before.items() <= items_in(store).items()
    check_tables(tables, one_device)


@pytest.mark.long
def test_two_processes_that_slurm_tells_who_they_are_give_the_table_of_one_device(
    tmp_path, one_device
):
    store, tables = tmp_path / "store", tmp_path / "tables"
    both = [start("both", store, tables, 4, "slurm", **own) for own in slurm_variables(2)]
    assert [process.wait(timeout=900) for process in both] == [0, 0]
    check_tables(tables, one_device)


@pytest.mark.long
def test_one_and_eight_devices_give_the_same_table_and_allocation(tmp_path):
    def tables(devices: int, name: str) -> dict[str, SensitivityTable]:
        folder = tmp_path / name
        assert start("both", folder / "store", folder, devices).wait(timeout=900) == 0
        return {m: SensitivityTable.load(folder / f"{m}.safetensors") for m in TOLERANCES}

    one, again, eight = tables(1, "one"), tables(8, "again"), tables(8, "eight")
    for method, tolerance in TOLERANCES.items():
        # The same devices in another process: the same bytes.
        np.testing.assert_array_equal(again[method].costs, eight[method].costs)
        np.testing.assert_allclose(
            eight[method].costs, one[method].costs, rtol=tolerance, atol=tolerance * 1e-8
        )
        choices = [solve(t[method].problem(budget_bits=10)).choice for t in (one, eight)]
        np.testing.assert_array_equal(*choices)


def test_an_item_is_computed_once(tmp_path):
    calls = []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(3.0)

    for _ in range(2):
        items = SweepStore(tmp_path, {"policy": "a"}).sweep(bits=[4])
        np.testing.assert_array_equal(items.get("x", compute), np.arange(3.0))
    assert len(calls) == 1
    assert "x" in SweepStore(tmp_path, {"policy": "a"}).sweep(bits=[4])


def test_nothing_is_taken_from_other_sweeps(tmp_path):
    SweepStore(tmp_path, {"policy": "a"}).sweep(bits=[4]).get("x", lambda: np.zeros(1))
    assert "x" not in SweepStore(tmp_path, {"policy": "b"}).sweep(bits=[4])
    assert "x" not in SweepStore(tmp_path, {"policy": "a"}).sweep(bits=[2])
    assert "x" in SweepStore(tmp_path).knowing(policy="a").sweep(bits=[4])


def test_what_a_kill_left_behind_is_no_item(tmp_path):
    store = SweepStore(tmp_path)
    store.sweep().get("x", lambda: np.zeros(1))
    (folder,) = tmp_path.iterdir()
    (folder / ".y.abc.tmp.npy").write_bytes(b"half")
    assert ".y.abc.tmp" not in store.sweep()
    assert "y" not in store.sweep()


def test_a_damaged_item_is_named(tmp_path):
    store = SweepStore(tmp_path)
    store.sweep().get("x", lambda: np.zeros(9))
    (path,) = tmp_path.glob("*/x.npy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"x\.npy: a finished item .* remove the file"):
        store.sweep().get("x", lambda: np.zeros(9))
