"""Episodes on a Ray cluster of two nodes on loopback, of which one is killed."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from qvla_jax.errors import InputError
from qvla_jax.evaluation import cluster
from qvla_jax.evaluation.closed_loop import run_episodes
from qvla_jax.evaluation.workers import Replay
from qvla_jax.provenance import package_versions

from ..simulators import Threads
from .test_closed_loop import Constant, Count, episode


class Slow(Count):
    """Takes a tenth of a second for a step, and says in a file which process it runs in."""

    def step(self, action: np.ndarray) -> bool:
        Path(os.environ["QVLA_TEST_PIDS"], str(os.getpid())).touch()
        time.sleep(0.1)
        return super().step(action)


def keep(environment, one, actions, path: Path) -> None:
    path.write_text(f"{environment.name} {len(actions)}")


@pytest.mark.long
def test_killed_workers_and_nodes_are_replaced(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs Ray (extra `cluster`)")
    utils = pytest.importorskip("ray.cluster_utils")
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("QVLA_TEST_PIDS", str(pids))
    episodes = [episode(task, state) for task in (0, 1) for state in (0, 3)]
    expected = {}
    policy = Constant(1.0, "p")
    run_episodes(
        episodes, {"p": policy}, Count, workers=2, crew=Threads(),
        on_result=lambda r: expected.update({r.episode: r}),
    )  # fmt: skip
    nodes = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = nodes.add_node(num_cpus=1)
    results, killed = {}, []

    class Killing(Constant):
        """Kills a process in the second of its calls, and a node later."""

        def infer_normalized(self, batch):
            if len(self.batches) == 2:
                killed.append(next(pids.iterdir()).name)
                os.kill(int(killed[0]), signal.SIGKILL)
            if len(self.batches) == 6:
                nodes.remove_node(other)
                nodes.add_node(num_cpus=1)
                killed.append("node")
            return super().infer_normalized(batch)

    try:
        crew = cluster.Cluster(nodes.address)
        assert crew.cpus == 2
        run_episodes(
            episodes, {"p": Killing(1.0, "p")}, Slow, workers=2, crew=crew,
            on_result=lambda r: results.update({r.episode: r}),
            choose_replay=lambda r: Replay(keep, tmp_path / f"{r.episode.task}{r.steps}.txt"),
        )  # fmt: skip
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert len(killed) == 2
    assert len(list(pids.iterdir())) > 2
    for one, result in expected.items():
        assert dataclasses.replace(results[one], seconds=result.seconds) == result
        written = tmp_path / f"{one.task}{result.steps}.txt"
        assert written.read_text() == f"{result.task_name} {result.steps}"


def test_other_versions_are_refused_by_name():
    said = cluster.Simulator(Count, {**package_versions(), "mujoco": "0.1"}).started()
    assert said.user
    assert "mujoco" in said.message
    assert "this machine 0.1" in said.message


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"qvla-jax\[cluster\]"):
        cluster.Cluster("auto")
