"""Stages that are killed: each works in a folder, and goes on where it was stopped."""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

BITS = (0, 4, 16)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        run: works in a folder until it is finished; started again, it goes on.
        result: of a finished folder, compared between runs that were killed and one that was not.
        check: raises unless every file under its final name is whole; at any moment.
        done: finished work items, which no later run may lose or repeat.
    """

    name: str
    run: Callable[[Path], None]
    result: Callable[[Path], Any]
    check: Callable[[Path], None]
    done: Callable[[Path], dict[str, str]]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _nothing(_: Path) -> dict[str, str]:
    return {}


def packing() -> Stage:
    """A packed file is written over an older one, again and again."""
    from qvla_jax import kernels
    from qvla_jax.checkpoints.packed_file import PackedFile, write_packed

    rng = np.random.default_rng(0)
    weight = kernels.pack(
        rng.normal(size=(64, 512)).astype(np.float32), np.full(64, 4), grid="rtn"
    )  # fmt: skip
    names = [f"layers.{i}" for i in range(40)]
    plain = kernels.LayerInputs()
    tensors = {"embedding": rng.normal(size=(1 << 20,)).astype(np.float32)}

    def write(path: Path, version: int) -> None:
        write_packed(
            path, layers=((name, weight, plain) for name in names), tensors=tensors,
            files={"tokenizer.json": b"{}"}, header={"config": {}, "number": version},
        )  # fmt: skip

    def run(folder: Path) -> None:
        for version in range(20):
            write(folder / "policy.qvla", version)

    def check(folder: Path) -> None:
        path = folder / "policy.qvla"
        if path.exists():
            file = PackedFile(path)
            file.check_others()
            for name in names:
                file.weight(name)

    return Stage("packing", run, lambda folder: _digest(folder / "policy.qvla"), check, _nothing)


def sweep() -> Stage:
    """An exact sweep of the toy policy."""
    import sys

    from qvla_jax import sharding
    from qvla_jax.sensitivity import SensitivityTable, SweepStore, sensitivities

    sys.path.insert(0, str(Path(__file__).parents[1] / "sensitivity"))
    from toys import ToyFrames, toy_policy  # pyright: ignore[reportMissingImports]

    def run(folder: Path) -> None:
        table = sensitivities(
            toy_policy(), ToyFrames(21), method="exact", bits=BITS, probes=3, batch=1, joint=False,
            mesh=sharding.sweep_mesh(1), store=SweepStore(folder / "store"),
        )  # fmt: skip
        table.save(folder / "table.safetensors")

    def items(folder: Path) -> dict[str, str]:
        found = sorted((folder / "store").glob("*/[!.]*.npy"))
        return {path.name: f"{path.stat().st_mtime_ns}" for path in found}

    def check(folder: Path) -> None:
        for path in (folder / "store").glob("*/[!.]*.npy"):
            np.load(path)
        for path in (folder / "store").glob("*/sweep.json"):
            json.loads(path.read_text())
        if (folder / "table.safetensors").exists():
            SensitivityTable.load(folder / "table.safetensors")

    def result(folder: Path) -> str:
        table = SensitivityTable.load(folder / "table.safetensors")
        # Without the provenance, which names the commit.
        return hashlib.sha256(table.costs.tobytes() + table.sizes.tobytes()).hexdigest()

    return Stage("sweep", run, result, check, items)


class _Counter:
    """A simulator whose task is done when the actions add up to a goal."""

    def __init__(self, episode: Any):
        self.task, self.name = episode.task, f"task_{episode.task}"

    def reset(self, initial_state: int, *, seed: int) -> None:
        del seed
        self.sum, self.goal = 0.0, 10.0 * (1 + self.task) + initial_state

    def observe(self) -> dict[str, Any]:
        picture = np.zeros((8, 8, 3), np.uint8)
        return {"image": picture, "state": np.float32([self.sum]), "instruction": self.name}

    def step(self, action: np.ndarray) -> bool:
        time.sleep(1e-4)
        self.sum += float(action[0])
        return self.sum >= self.goal

    def close(self) -> None:
        pass


class _Stepper:
    """A policy that always steps by the same amount."""

    def __init__(self, step: float, fingerprint: str):
        from qvla_jax.families.prismatic.config import preset

        self.step, self.fingerprint, self.config = step, fingerprint, preset("tiny-test")
        self.observation = SimpleNamespace(image_size=8)

    def infer_normalized(self, batch: Any) -> np.ndarray:
        return np.full((len(batch["instruction"]), 4, 7), self.step, np.float32)

    def standard_actions(self, actions: np.ndarray, state: Any = None) -> np.ndarray:
        return actions


def evaluation() -> Stage:
    """Closed-loop episodes of a simulator that counts."""
    from qvla_jax.pipeline import closed_loop as stage
    from qvla_jax.pipeline import files

    from ..simulators import Threads

    run_episodes = stage.run_episodes

    def run(folder: Path) -> None:
        stage.run_episodes = lambda *a, **k: run_episodes(*a, **{**k, "crew": Threads()})
        policies: Any = {"one": _Stepper(0.05, "a"), "two": _Stepper(0.1, "b")}
        config = stage.ClosedLoopConfig(
            sim="libero_spatial", out=folder, policy=tuple(policies), tasks=(0, 1),
            episodes_per_task=10, videos=False, workers=2,
        )  # fmt: skip
        stage.closed_loop(config, policies=policies, make=_Counter)

    def lines(folder: Path) -> dict[str, str]:
        return {str(i): line for i, line in enumerate(_whole_lines(folder / stage.EPISODES_FILE))}

    def check(folder: Path) -> None:
        for line in lines(folder).values():
            json.loads(line)
        if (folder / files.CLOSED_LOOP).exists():
            json.loads((folder / files.CLOSED_LOOP).read_text())

    def result(folder: Path) -> Any:
        summary = json.loads((folder / files.CLOSED_LOOP).read_text())
        return len(lines(folder)), {k: v for k, v in summary.items() if k != "provenance"}

    return Stage("evaluation", run, result, check, lines)


def training() -> Stage:
    """Behaviour cloning of the smallest policy on the bundled episodes."""
    from qvla_jax.checkpoints import public_tensors
    from qvla_jax.checkpoints.checksums import check_checksums
    from qvla_jax.checkpoints.tensor_files import ShardedTensors
    from qvla_jax.data import bundled_path
    from qvla_jax.inference import load_policy
    from qvla_jax.training import TrainConfig, train

    def run(folder: Path) -> None:
        config = TrainConfig(
            data=(str(bundled_path()),), out=folder, model="tiny-test", train_split="calibration",
            steps=20, batch_size=8, warmup_steps=2, decay_steps=2, checkpoint_every=1,
            evaluate_every=5,
        )  # fmt: skip

        def note(stage: str, done: int, total: int) -> None:
            del total
            if stage == "train":
                with open(folder / "steps", "a") as file:
                    file.write(f"{done}\n")

        train(config, progress=note)
        digest = hashlib.sha256()
        for name, tensor in sorted(public_tensors(load_policy(folder / "policy").model).items()):
            digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
        (folder / "digest").write_text(digest.hexdigest())

    def check(folder: Path) -> None:
        for step in (folder / "checkpoints").glob("*"):
            if not step.name.isdecimal():  # half of one
                continue
            check_checksums(step, remedy="")
        if (folder / "policy" / "config.json").exists():
            json.loads((folder / "policy" / "config.json").read_text())
            tensors = ShardedTensors(folder / "policy")
            for name in tensors:
                assert np.isfinite(np.asarray(tensors[name], np.float32)).all()
        # A checkpoint follows each step: no more than that step is computed again.
        steps = [int(line) for line in _whole_lines(folder / "steps")]
        assert all(after >= before for before, after in itertools.pairwise(steps)), steps

    def result(folder: Path) -> Any:
        log = [json.loads(line) for line in _whole_lines(folder / "log.jsonl")]
        return (folder / "digest").read_text(), [line["heldout_l1_normalized"] for line in log]

    return Stage("training", run, result, check, _nothing)


def study() -> Stage:
    """The table of results of the smallest policy: four cells, offline."""
    from qvla_jax import pipeline
    from qvla_jax.checkpoints.packed_file import PackedFile
    from qvla_jax.inference import random_policy
    from qvla_jax.pipeline import files

    def run(folder: Path) -> None:
        policy = folder.parent / "tiny"
        if not policy.exists():  # the first run is not killed
            random_policy("tiny-test", seed=0).save(policy)
        config = pipeline.StudyConfig(
            model=str(policy), out=folder, rows=("rtn", "rtn-g16"), columns=("w4a16", "w2"),
            frames=4, eval_frames=6, eval_batch=6,
        )  # fmt: skip
        pipeline.study(config)

    def cells(folder: Path) -> list[Path]:
        found = [*(folder / files.CELLS).glob("[!.]*"), *(folder / "methods").glob("[!.]*")]
        return sorted(found)

    def check(folder: Path) -> None:
        for path in cells(folder):
            if path.suffix == ".qvla":
                file = PackedFile(path)
                file.check_others()
                for name in file.layers:
                    file.weight(name)
            else:
                json.loads(path.read_text())
        for path in folder.glob("[!.]*.json"):
            json.loads(path.read_text())

    def result(folder: Path) -> Any:
        results = json.loads((folder / files.STUDY).read_text())
        del results["provenance"]
        made = {p.name: _digest(p) for p in cells(folder) if p.suffix == ".qvla"}
        assert len(made) == 4
        return results, made, (folder / files.STUDY_TABLE).read_text()

    def done(folder: Path) -> dict[str, str]:
        return {path.name: f"{path.stat().st_mtime_ns}" for path in cells(folder)}

    return Stage("study", run, result, check, done)


def _whole_lines(path: Path) -> list[str]:
    """Without the half of a line that a kill left."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


# The last one runs JAX before it forks.
STAGES = (evaluation, sweep, training, study, packing)
