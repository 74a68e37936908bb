"""Static schedules: bundles counted in a recorded program, and what the TPU kernel may take."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .test_ahead_of_time import TPU

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What libtpu 0.0.42.1 made for v6e of a grid of 5 steps, which copies a block where t[step] > 2;
# without its comments. Bundles 7 to 47 are the grid, 17 to 39 one step, 31 to 34 the copy.
RECORDED = Path(__file__).with_name("bundles.txt")


@pytest.fixture(scope="module")
def bundles():
    spec = importlib.util.spec_from_file_location("tpu_bundles", BENCHMARKS / "tpu_bundles.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_recorded_program_is_counted(bundles):
    program = bundles.parse(RECORDED.read_text())
    assert len(program) == 52
    assert (program[26].branch, program[26].condition) == (35, ("p6", True))
    counts = bundles.executed(program, {0: np.array([3, 0, 5, 1, 9])})
    # The grid runs ahead by one step and ends one later.
    expected = [1] * 7 + [7] * 10 + [5] * 14 + [3] * 4 + [5] * 5 + [7] * 8 + [1] * 4
    assert counts.tolist() == expected


def test_what_is_unknown_is_executed(bundles):
    program = bundles.parse(RECORDED.read_text())
    assert bundles.executed(program, {})[31] == 5
    # But not for ever.
    endless = RECORDED.read_text().replace(
        "%s18_s12 = sadd.s32 1, %s208_s12", "%s18_s12 = spop %v1"
    )
    with pytest.raises(ValueError, match="bundle 43: the end of the loop is unknown"):
        bundles.executed(bundles.parse(endless), {})


def test_missing_bundles_are_refused(bundles):
    with pytest.raises(ValueError, match="bundle 0x2 comes after 1 bundles"):
        bundles.parse("     0   :  {}\n   0x2   :  {}\n")


def test_slots_are_read(bundles):
    names, capacity, used = bundles.slots(
        "== CAPACITY:\nMXU, VLOAD:FILL, SALU\n    2     3     2\n== UTILIZATION:\n0 0 2\n1 3 0\n"
    )
    assert names == ("MXU", "VLOAD:FILL", "SALU")
    assert capacity.tolist() == [2, 3, 2]
    assert used.tolist() == [[0, 0, 2], [1, 3, 0]]


# (weight, rows) -> bundles for each block: a tenth more than it took with libtpu 0.0.42.1.
CAPS = {
    "v5e": {("2", 1): 1060, ("4", 1): 1060, ("mixed", 1): 700, ("4", 600): 22000},
    "v6e": {("2", 1): 1100, ("4", 1): 1090, ("mixed", 1): 750, ("4", 600): 6100},
}


@pytest.mark.parametrize("target", [pytest.param(name, marks=TPU) for name in CAPS])
def test_blocks_take_no_more_bundles_than_they_did(target):
    script = BENCHMARKS / "static_schedule.py"
    options = ["--shape", "4096x4096", "--activations", "16", "--alone"]
    done = subprocess.run(
        [sys.executable, script, target, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    head, _, *rows = rows
    found = {
        (re.sub(".*, ", "", row[head.index("shape, weight")]), int(row[head.index("rows")])): int(
            row[head.index("a block")]
        )
        for row in rows
    }
    for case, cap in CAPS[target].items():
        assert found[case] <= cap, case
