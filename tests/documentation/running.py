"""Runs commands of the pages, made small.

Numbers that only make a command long are replaced by small ones (`SMALLER`), and what this machine
cannot have by the like of it (`STAND_INS`). Commands with `--sim` need the simulator (extra
`libero`).
"""

import importlib.util
import itertools
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from qvla_jax import cli

from ..sensitivity.cluster import slurm_variables

SIMULATOR = importlib.util.find_spec("mujoco") is not None

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
    r"(openvla/|moojink/|gs://openpi-)\S+": "checkpoints/my-openvla-oft",
    r"openvla-oft-(7b|directory)\b": "checkpoints/my-openvla-oft",
    r" --preset \S+ --tokenizer \S+": "",  # of a directory of openpi
    r"--preset \S+": "--preset tiny-test",
    r"--channel-devices \d": "--channel-devices 1",
    # One process instead of several; two that meet are a test of the sweep's.
    r"(?i)host0:1234 --processes \d --process \d": "127.0.0.1:PORT --processes 1 --process 0",
    r"--lerobot-port \d+": "--lerobot-port 0",
    r" --cluster \S+": "",  # what a cluster changes is a test of its own
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


def done(command: str) -> None:
    """Runs a command in this process, or in one of its own where it does not share one."""
    arguments = small(command)
    if arguments[0] == "serve":
        serves(arguments)
    elif "--coordinator" in arguments or "--distributed" in arguments:
        (cluster,) = slurm_variables(1)
        subprocess.run([*PROGRAM, *arguments], env=os.environ | cluster, check=True)
    else:
        # As in a process of a reader's: optax's Muon promotes implicitly.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert cli.main(arguments) == cli.DONE, shlex.join(arguments)


PROGRAM = [sys.executable, "-m", "qvla_jax.cli"]


def serves(arguments: list[str]) -> None:
    """The server answers, and ends when it is asked to."""
    with server(arguments) as port:
        encrypted = "--tls-cert" in arguments
        address = f"http{'s' * encrypted}://127.0.0.1:{port}/healthz"
        context = ssl.create_default_context(cafile="cert.pem") if encrypted else None
        with urllib.request.urlopen(address, context=context) as answer:
            assert answer.status == 200


@contextmanager
def server(arguments: list[str]) -> Iterator[int]:
    """A server that runs, at a port of its own, and ends as it should when it is asked to."""
    port = free_port()
    process = subprocess.Popen([*PROGRAM, *arguments, "--port", str(port)])
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == cli.DONE
    finally:
        process.kill()
