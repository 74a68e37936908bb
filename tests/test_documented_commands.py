"""Every `qvla` command of the pages runs, in the order of its page, on a policy of few channels.

A page starts in a folder of its own that holds what a reader is told to have: policies, a robot's
data, the folder of an earlier run. Numbers that only make a command long are replaced by small ones
(`SMALLER`), and what this machine cannot have by the like of it (`STAND_INS`). Commands with
`--sim` need the simulator (extra `libero`).
"""

import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from qvla_jax import cli
from qvla_jax.config import PRESETS
from qvla_jax.data import open_x
from qvla_jax.inference import random_policy
from qvla_jax.pipeline import files
from qvla_jax.sensitivity import SensitivityTable

pytest.importorskip("tensorflow", reason="writing RLDS needs TensorFlow (extra `rlds`)")

from .data import open_x_sets
from .test_documentation import NOTEBOOKS, PAGES, ROOT, commands_in, markdown

# TensorFlow and Beam warn about their own dependencies.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]

EVALUATION = {"--eval-frames": "8", "--eval-batch": "8"}
EPISODES = {"--episodes-per-task": "2", "--tasks": "0", "--workers": "2"}
CALIBRATE = {"--frames": "6"}
SENSITIVITY = {"--probes": "2", "--validate": "4", "--validate-frames": "2"}
EVALUATE = {**EVALUATION, "--latency-calls": "2"}
STUDY = {**EVALUATION, "--frames": "6", "--probes": "2"}
SMALLER: dict[str, dict[str, str]] = {
    "run": {**CALIBRATE, **SENSITIVITY, **EVALUATE},
    "calibrate": CALIBRATE,
    "calibrate --mixture": {"--frames": "64"},
    "sensitivity": SENSITIVITY,
    "allocate": {"--sweep": "3"},
    "evaluate": EVALUATE,
    "evaluate --sim": EPISODES,
    "collect --sim": EPISODES,
    "study": {**STUDY, "--rows": "rtn action", "--columns": "w4a16 w4a4"},
    "study --rows": {**STUDY, "--columns": "w4a4 w3"},
    "study --sim": {**STUDY, **EPISODES, "--rows": "action smoothquant", "--columns": "w4a4"},
    "measure-solvers": {**EVALUATE, "--rounds": "1", "--turns": "2", "--population": "4"},
    "compare-solvers": {"--time-limit": "2", "--budgets": "3"},
    "validate": {
        "--eval-frames": "8", "--channels": "8", "--frames": "3", "--sizes": "2 4", "--seeds": "1",
        "--trajectories": "2",
    },
    "train": {
        "--steps": "2", "--batch-size": "4", "--warmup-steps": "1", "--decay-steps": "1",
        "--checkpoint-every": "1", "--evaluate-every": "2", "--heldout-split": "train",
    },
}  # fmt: skip
STAND_INS = {
    r"gs://gresearch/robotics/taco_play/0\.1\.0": "data/taco_play",
    r"gs://my-bucket/my_robot/1\.0\.0": "data/my_robot",
    r"gs://bucket/open_x": "data/open_x",
    r"openvla-oft-(7b|directory)\b": "checkpoints/my-openvla-oft",
    r"--preset \S+": "--preset tiny-test",
    r"--channel-devices \d": "--channel-devices 1",
    # One process instead of several; two that meet are a test of the sweep's.
    r"(?i)host0:1234 --processes \d --process \d": "127.0.0.1:PORT --processes 1 --process 0",
    r"\bSOURCE\b": "checkpoints/my-openvla-oft",
    r"\bFILE\.qvla\b": "mini.qvla",
    r"\bFOLDER\b": "runs/sim",
    r"\bDIR\b": "runs/made-NUMBER",
}
# What sentences leave out.
LEFT_OUT = {
    "qvla quantize --method action-w4a4": ["--out", "runs/mini"],
    "qvla report --simulation FOLDER": ["--out", "runs/mini"],
    "qvla train": ["--out", "runs/trained"],
}


def small(command: str) -> list[str]:
    """The arguments of a command, made small; a zero stays, because it turns something off."""
    added = next((more for start, more in LEFT_OUT.items() if command.startswith(start)), [])
    for pattern, replacement in STAND_INS.items():
        command = re.sub(pattern, replacement, command)
    fresh = {"PORT": free_port(), "NUMBER": next(NUMBERS)}
    for word, value in fresh.items():
        command = command.replace(word, str(value))
    _, name, *arguments = shlex.split(command)
    if "--config" in arguments:
        return [name, *arguments]  # of a command that was made small
    special = (f"{name} {o}" for o in ("--sim", "--rows", "--mixture") if o in arguments)
    kind = next((kind for kind in special if kind in SMALLER), name)
    for option, value in SMALLER.get(kind, {}).items():
        if option not in arguments:
            arguments += [option, *value.split()]
            continue
        start = arguments.index(option) + 1
        end = start
        while end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        if arguments[start:end] != ["0"]:
            arguments[start:end] = value.split()
    return [name, *arguments, *added]


NUMBERS = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def robot() -> open_x_sets.Structure:
    """A set that the specification in docs/data.md reads."""
    observation = {
        "front_camera": "image", "hand_camera": "image", "joints": "f4[6]", "gripper": "f4[1]"
    }  # fmt: skip
    step = {"action": "f4[8]", "observation": observation, "language_instruction": "text"}
    return open_x_sets.Structure(step, {"episode_metadata": {"file_path": "text"}}, signed=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory, closed_loop_summary) -> Path:
    """What readers are told to have, and what an earlier page left."""
    folder = tmp_path_factory.mktemp("world")
    config = PRESETS["tiny-test"]
    # Wide enough for groups of 128.
    text = dataclasses.replace(config.text, hidden_size=128, intermediate_size=128)
    vision = tuple(
        dataclasses.replace(tower, embed_dim=128, mlp_dim=128) for tower in config.vision
    )
    wide = dataclasses.replace(config, name="wide-test", text=text, vision=vision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, wide.name, wide)
        random_policy(wide.name, seed=0).save(folder / "libero-mini")
    (specification,) = re.findall(r"```json\n(.*?)```", markdown(ROOT / "docs" / "data.md"), re.S)
    (folder / "my_robot.json").write_text(specification)
    long = {"lengths": (12, 10)}
    open_x_sets.write(folder / "data", "my_robot", structure=robot(), **long)
    for name in ("taco_play", "bridge_orig", "toto"):
        open_x_sets.write(folder / "data", name, **long)
    for name in open_x.MIXTURES["oxe_magic_soup_plus"]:
        open_x_sets.write(folder / "data" / "open_x", name, **long)
    structure = open_x_sets.STRUCTURES["libero"]
    written, _ = open_x_sets.write(folder, "libero_spatial", structure=structure, **long)
    shutil.copytree(written, folder / "libero_spatial_rlds")
    if not SIMULATOR:  # which would write it
        shutil.copytree(written, folder / "rlds-visited" / "libero_spatial" / "1.0.0")
    (folder / "runs" / "sim").mkdir(parents=True)
    (folder / "runs" / "sim" / files.CLOSED_LOOP).write_text(json.dumps(closed_loop_summary))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done("qvla run --model libero-mini --budget-bits 4 --match-uniform 2 3 4 8 --out runs/mini")
        done("qvla export --model libero-mini --out checkpoints/my-openvla-oft")
        done("qvla pack --model libero-mini --bits 4 --file mini.qvla")
        shutil.copytree("runs/mini", "demo")  # `make demo`
        table = SensitivityTable.load(Path("runs/mini") / files.SENSITIVITY)
        table.problem(budget_bits=4.0).save("problem.npz")
    return folder


def done(command: str) -> None:
    """Runs a command in this process, or in one of its own where it does not share one."""
    arguments = small(command)
    if arguments[0] == "serve":
        serves(arguments)
    elif "--coordinator" in arguments:
        subprocess.run([*PROGRAM, *arguments], check=True)
    else:
        # As in a process of a reader's: optax's Muon promotes implicitly.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert cli.main(arguments) == cli.DONE, shlex.join(arguments)


PROGRAM = [sys.executable, "-m", "qvla_jax.cli"]


def serves(arguments: list[str]) -> None:
    """The server answers, and ends when it is asked to."""
    port = free_port()
    server = subprocess.Popen([*PROGRAM, *arguments, "--port", str(port)])
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == cli.DONE
    finally:
        server.kill()


SIMULATOR = importlib.util.find_spec("mujoco") is not None


def pages() -> list[Any]:
    """The pages that have commands, those with `--sim` left out where there is no simulator."""
    found = []
    for page in (*PAGES, *NOTEBOOKS):
        commands = [c for c in commands_in(markdown(page)) if SIMULATOR or "--sim " not in c]
        if commands:
            found.append(
                pytest.param(list(dict.fromkeys(commands)), id=str(page.relative_to(ROOT)))
            )
    return found


@pytest.fixture
def reader(world, tmp_path, monkeypatch) -> Iterator[Path]:
    """A reader's folder, which is the working directory."""
    folder = tmp_path / "reader"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    yield folder
    jax.clear_caches()  # compiled programs of a page take a gigabyte


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("commands", pages())
def test_commands_of_a_page_run(commands):
    for command in commands:
        done(command)
