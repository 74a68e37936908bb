"""A reader's folder: what the pages say that readers have, with policies of few channels."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from qvla_jax.data import open_x
from qvla_jax.families.prismatic.config import PRESETS
from qvla_jax.inference import random_policy
from qvla_jax.pipeline import files
from qvla_jax.plain import to_plain
from qvla_jax.sensitivity import SensitivityTable

from ..data import lerobot_sets, open_x_sets
from .pages import ROOT, markdown
from .running import SIMULATOR, done


def robot() -> open_x_sets.Structure:
    """A set that the specification in docs/data.md reads."""
    observation = {
        "front_camera": "image", "hand_camera": "image", "joints": "f4[6]", "gripper": "f4[1]"
    }  # fmt: skip
    step = {"action": "f4[8]", "observation": observation, "language_instruction": "text"}
    return open_x_sets.Structure(step, {"episode_metadata": {"file_path": "text"}}, signed=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory, closed_loop_summary) -> Path:
    """What readers are told to have, and what an earlier page left."""
    pytest.importorskip("tensorflow", reason="writing RLDS needs TensorFlow (extra `rlds`)")
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
    lerobot_sets.write(folder / "data" / "libero", lerobot_sets.parts((12, 10), videos=True))
    joints = lerobot_sets.joint_parts("lerobot/aloha_sim_insertion_human", (12, 10))
    lerobot_sets.write(folder / "data" / "aloha", joints)
    structure = open_x_sets.STRUCTURES["libero"]
    written, _ = open_x_sets.write(folder, "libero_spatial", structure=structure, **long)
    shutil.copytree(written, folder / "libero_spatial_rlds")
    if not SIMULATOR:  # which would write it
        shutil.copytree(written, folder / "rlds-visited" / "libero_spatial" / "1.0.0")
    (command,) = re.findall(
        r"openssl (req .*?\.pem)\n", (ROOT / "docs" / "serving.md").read_text().replace("\\\n", "")
    )
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    (folder / "runs" / "sim").mkdir(parents=True)
    (folder / "runs" / "sim" / files.CLOSED_LOOP).write_text(
        json.dumps(to_plain(closed_loop_summary))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done("qvla run --model libero-mini --budget-bits 4 --match-uniform 2 3 4 8 --out runs/mini")
        done("qvla export --model libero-mini --out checkpoints/my-openvla-oft")
        done("qvla pack --model libero-mini --bits 4 --file mini.qvla")
        shutil.copytree("runs/mini", "demo")  # `make demo`
        table = SensitivityTable.load(Path("runs/mini") / files.SENSITIVITY)
        table.problem(budget_bits=4.0).save("problem.npz")
    return folder


@pytest.fixture
def reader(world, tmp_path, monkeypatch) -> Iterator[Path]:
    """A reader's folder, which is the working directory."""
    folder = tmp_path / "reader"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    yield folder
    jax.clear_caches()  # compiled programs of a page take a gigabyte
