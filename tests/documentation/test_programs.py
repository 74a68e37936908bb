"""The other commands of the pages run, small: benchmarks, targets of make, selections of tests."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT, all_programs, markdown
from .running import server

# TensorFlow and Beam warn about their own dependencies.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]

# Script -> what makes it small; options that are there are given again, and the last one counts.
SMALLER = {
    "kernels.py": "--shapes 256x256 --rows 1 8 --seconds 0.01 --rotation-mib 1",
    "ahead_of_time.py": "--shape 256x256 --rows 8",
    "gpu_schedule.py": "--shape 1024x4096 --weight 4 --rows 1",
    "static_schedule.py": "--shape 256x256 --weight mixed --rows 8 --alone",
    "sensitivity_speed.py": "--frames 4 --rounds 1 --channels 15 --turns 2 --layers 2",
    "streamed_sensitivity.py": "--probes 2 --grid rtn",
    "sweep_ahead_of_time.py": "--preset tiny-test --probes 2",
    "whole_policy.py": "--policy tiny-test --weights mixed",
    "latency.py": "--frames 4",
    "full_size.py": "--rounds 1 --alone",
    "serve_load.py": "--clients 4 --seconds 3 --abuse 4",
    "serve_libero.py": "--episodes 1",
    "solvers.py": "--scale 0.005 --time-limit 5",
    "fuzz": "--cases 2000",
}
STAND_INS = {
    "synthetic-oft": "checkpoints/my-openvla-oft",
    "oft.qvla": "mini.qvla",
    "pi05.qvla": "mini.qvla",
    "four.qvla": "mini.qvla",
    "openvla-7b": "tiny-test",
}
# Script -> packages that it is about.
NEEDS = {
    "sensitivity_speed.py": ("torch",),
    "serve_libero.py": ("mujoco", "openpi_client"),
    "ahead_of_time.py v5e": ("libtpu",),
    "static_schedule.py": ("libtpu",),
    "sweep_ahead_of_time.py v6e": ("libtpu",),
    "whole_policy.py": ("libtpu",),
    "ahead_of_time.py h100": ("jax_cuda13_plugin",),
    "gpu_schedule.py h100": ("jax_cuda13_plugin",),
    "sweep_ahead_of_time.py h100": ("jax_cuda13_plugin",),
}


def run(*command: str | Path) -> str:
    """What it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("command", all_programs("python benchmarks/"))
def test_benchmarks_run(command, reader):
    _, script, *arguments = shlex.split(command)
    name = Path(script).name
    for start, packages in NEEDS.items():
        if command.startswith(f"python benchmarks/{start}"):
            for package in packages:
                pytest.importorskip(package, exc_type=ImportError)
    arguments = [STAND_INS.get(a, a) for a in arguments] + SMALLER[name].split()
    program = [sys.executable, ROOT / script, *arguments]
    if name == "serve_libero.py":
        with server(["serve", "--policy", "mini.qvla", "--gripper", "libero"]) as port:
            printed = run(*program, "--port", str(port))
    else:
        printed = run(*program)
    assert re.search(r"\d", printed)


def test_fuzzing_runs(monkeypatch, tmp_path):
    (command,) = all_programs("python -m fuzz")
    assert command.split()[3] == "--cases"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(tmp_path)
    printed = run(sys.executable, "-W", "ignore", "-m", "fuzz", *SMALLER["fuzz"].split())
    assert re.search(r"2,\d{3} cases, 0 findings", printed)


# Target -> what makes it small.
TARGETS = {
    "demo": (),
    "docs": (),
    "faults": ("KILLS=1",),
    "prove-solvers": ("PROOF_FACTOR=1",),
}
# Target -> why it is not run here.
LEFT_OUT = {
    "test": "these tests",
    "test-long": "these tests",
    "test-lowest": "these tests, in another environment",
    "test-newest": "these tests, in another environment",
    "test-aarch64": "long tests by another name",
    "sanitize": "the tests of the CPU kernel, with its library compiled again",
    "notebooks": "tests of their own",
    "lint": "no test; every change is checked by it (.ci/run)",
    "format": "changes the checkout",
    "fuzz": "installs a package; what it calls is run above",
    "bench-solvers": "has no smaller size; what it calls is run above",
    "audit": "asks a service on the internet",
}


def target_of(command: str) -> str:
    return command.split()[1]


def test_no_target_is_forgotten():
    named = {target_of(command) for command in all_programs("make ")}
    assert named == TARGETS.keys() | LEFT_OUT.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_targets_run(target, reader):
    environment = Path(sys.prefix)
    makefile = shutil.copy(ROOT / "Makefile", reader)
    for folder in ("tests", "docs", "qvla_jax", "solvers", "data"):
        (reader / folder).exists() or (reader / folder).symlink_to(ROOT / folder)
    # What is installed is used as it is.
    installed = (f"--assume-old={environment}/.{stamp}" for stamp in ("dev", "core"))
    run("make", "-f", makefile, f"VENV={environment}", *installed, target, *TARGETS[target])
    if target == "demo":
        assert (reader / "demo" / "report.html").exists()


@pytest.mark.parametrize("command", all_programs("pytest "))
def test_selections_of_tests_select_some(command):
    _, *arguments = shlex.split(command)
    run(sys.executable, "-m", "pytest", "--rootdir", ROOT, "--collect-only", "-q", *arguments)


@pytest.mark.usefixtures("reader")
def test_the_client_of_the_readme_gets_actions(tmp_path):
    pytest.importorskip("openpi_client")
    (code,) = re.findall(r"```python\n(import numpy.*?)```", markdown(ROOT / "README.md"), re.S)
    assert "8000" in code
    with server(["serve", "--policy", "mini.qvla"]) as port:
        client = tmp_path / "client.py"
        client.write_text(code.replace("8000", str(port)))
        assert re.match(r"\(\d+, 7\) [\d.]+ ms", run(sys.executable, client))
