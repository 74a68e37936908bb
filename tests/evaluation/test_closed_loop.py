"""The protocol of closed-loop episodes, on an environment whose outcome can be counted by hand."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qvla_jax.errors import InputError, QvlaError
from qvla_jax.evaluation.closed_loop import decide, run_episodes
from qvla_jax.evaluation.episodes import Episode, EpisodeLog, Result, episode_seed, jerk
from qvla_jax.evaluation.motion import compare_motion
from qvla_jax.evaluation.video import film
from qvla_jax.evaluation.workers import Replay
from qvla_jax.families.prismatic.config import preset
from qvla_jax.pipeline import closed_loop as stage
from qvla_jax.pipeline.closed_loop import ClosedLoopConfig
from qvla_jax.plain import to_plain

from ..simulators import Threads


class Count:
    """Done when the actions (their first entry) add up to a goal that task and state decide."""

    made = 0

    def __init__(self, episode: Episode):
        if episode.task == 9:
            raise InputError("no such task")
        if episode.task == 8:
            raise ZeroDivisionError("broken on purpose")
        Count.made += 1
        self.task, self.name, self.sum, self.goal = episode.task, f"task_{episode.task}", 0.0, 0.0

    def reset(self, initial_state: int, *, seed: int) -> None:
        del seed
        self.sum, self.goal = 0.0, 10.0 * (1 + self.task) + initial_state

    def observe(self):
        return {
            "image": self.render("image"),
            "state": np.float32([self.sum, self.goal]),
            "instruction": self.name,
        }

    def render(self, camera: str) -> np.ndarray:
        return np.full((8, 8, 3), 50 if camera == "image" else 200, np.uint8)

    def step(self, action: np.ndarray) -> bool:
        self.sum += float(action[0])
        return self.sum >= self.goal

    def close(self) -> None:
        pass


class Constant:
    """Always steps by the same amount; remembers what it was asked."""

    def __init__(self, step: float, fingerprint: str):
        self.step, self.fingerprint = step, fingerprint
        self.config, self.observation = preset("tiny-test"), SimpleNamespace(image_size=8)
        self.layout = SimpleNamespace(executed_steps=None)
        self.batches: list[dict] = []

    def infer_normalized(self, batch):
        self.batches.append(batch)
        return np.full((len(batch["instruction"]), 4, 7), self.step / 2, np.float32)

    def standard_actions(self, actions, state=None):
        return 2 * actions


def episode(task=0, state=0, policy="p", **changes):
    settings = {
        "suite": "libero_spatial", "seed": 7, "max_steps": 22, "open_loop_steps": 3, "size": 8,
        "rendering": "fast", "simulator": "none",
    }  # fmt: skip
    return Episode(policy_hash=policy, task=task, initial_state=state, **{**settings, **changes})


def run(episodes, policies, workers=2, make=Count, **options):
    results: list[Result] = []
    run_episodes(
        episodes,
        {policy.fingerprint: policy for policy in policies},
        make,
        workers=workers,
        on_result=results.append,
        crew=Threads(),
        **options,
    )
    return {result.episode: result for result in results}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_episode_ends_as_counted_by_hand(workers):
    steps = {"slow": 1.0, "fast": 2.5}
    slow, fast = (Constant(step, name) for name, step in steps.items())
    episodes = [
        episode(task, state, policy)
        for task in (0, 1, 2)
        for policy in ("slow", "fast")
        for state in (0, 3)
    ]
    results = run(episodes, [slow, fast], workers=workers)
    assert results.keys() == set(episodes)
    for one, result in results.items():
        goal, pace = 10 * (1 + one.task) + one.initial_state, steps[one.policy_hash]
        needed = math.ceil(goal / pace)
        assert result.success == (needed <= 22)
        assert result.steps == min(needed, 22)
        assert result.task_name == f"task_{one.task}"
        assert result.seconds >= 0
    assert all(len(batch["instruction"]) == workers for batch in slow.batches + fast.batches)


def test_actions_run_open_loop_and_the_limit_cuts_a_chunk():
    policy = Constant(0.1, "p")
    result = run([episode()], [policy], workers=1)[episode()]
    assert not result.success
    assert result.steps == 22
    seen = [float(batch["state"][0, 0]) for batch in policy.batches]
    np.testing.assert_allclose(seen, 0.1 * np.arange(0, 22, 3), rtol=1e-5)


def test_a_worker_stays_with_its_task():
    Count.made = 0
    episodes = [episode(task, state) for state in range(4) for task in (0, 1)]
    run(episodes, [Constant(5.0, "p")], workers=1)
    assert Count.made == 2


def test_results_hold_the_path_and_the_deviations_of_shadows():
    slow, fast = Constant(1.0, "slow"), Constant(1.5, "fast")
    results = run(
        [episode(policy="slow"), episode(policy="fast")],
        [slow, fast],
        shadows={"slow": ["fast"]},
    )
    reference, other = results[episode(policy="slow")], results[episode(policy="fast")]
    assert [position[0] for position in reference.positions] == [0.0, 3.0, 6.0, 9.0]
    assert [position[0] for position in other.positions] == [0.0, 4.5, 9.0]
    # Three executed actions of seven entries, each 0.25 apart in the normalized space.
    np.testing.assert_allclose(reference.deviations["fast"], 4 * [3 * 7 * 0.25**2], rtol=1e-6)
    assert not other.deviations


def test_no_episodes_start_no_worker():
    run_episodes([], {}, Count, workers=2, on_result=print, crew=None)


def test_rows_are_padded_to_one_shape():
    policy = Constant(1.0, "p")
    seen = {"state": np.ones(2, np.float32), "instruction": "go", "image": np.ones((2, 2, 3))}
    assert decide(policy, [seen, seen], rows=5).shape == (2, 4, 7)
    (batch,) = policy.batches
    assert batch["instruction"] == ["go"] * 5
    assert batch["state"].shape == (5, 2)


def test_actions_that_are_not_finite_end_the_run():
    with pytest.raises(QvlaError, match="not finite"):
        run([episode()], [Constant(np.nan, "p")])


def test_a_failing_worker_says_where_and_what():
    with pytest.raises(InputError, match="no such task"):
        run([episode(task=9)], [Constant(1.0, "p")])
    with pytest.raises(QvlaError, match=r"task 8, initial state 2(.|\n)*broken on purpose"):
        run([episode(task=8, state=2)], [Constant(1.0, "p")])


def test_videos_replay_what_was_executed(tmp_path):
    av = pytest.importorskip("av", reason="videos need PyAV (extra `libero`)")
    path = tmp_path / "videos" / "one.mp4"
    run([episode()], [Constant(1.0, "p")], choose_replay=lambda result: Replay(film, path))
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 6  # The start, and every second of 10 steps.
    assert frames[0].shape == (256, 512, 3)
    assert abs(int(frames[0][100, 100, 0]) - 50) < 6
    assert abs(int(frames[0][100, 400, 0]) - 200) < 6


PROGRAM = """
import os, sys
import numpy as np

class Dies:
    name = "dies"
    def __init__(self, episode): pass
    def reset(self, initial_state, *, seed): self.state = initial_state
    def observe(self): return {"instruction": "jax" if "jax" in sys.modules else "none"}
    def step(self, action):
        if self.state == 1:
            os._exit(7)
        return True
    def close(self): pass

class Policy:
    def infer_normalized(self, batch):
        assert set(batch["instruction"]) == {"none"}, "a simulator process imported JAX"
        return np.zeros((len(batch["instruction"]), 1, 7))
    def standard_actions(self, actions, state=None):
        return actions

if __name__ == "__main__":
    from qvla_jax.errors import QvlaError
    from qvla_jax.evaluation.episodes import Episode
    from qvla_jax.evaluation.closed_loop import run_episodes
    episodes = [
        Episode(policy_hash="p", suite="s", task=0, initial_state=state, seed=0, max_steps=5,
                open_loop_steps=1, size=8, rendering="fast", simulator="none")
        for state in (0, 1)
    ]
    try:
        run_episodes(episodes, {"p": Policy()}, Dies, workers=1,
                     on_result=lambda result: print(result.success))
    except QvlaError as error:
        print(error)
"""


def test_a_dead_process_is_one_error(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.stderr == ""
    finished, error = done.stdout.strip().splitlines()
    assert finished == "True"
    assert "3 simulator processes died (exit code 7) in s task 0, initial state 1" in error


class DiesOnce(Count):
    """The first of its kind dies in the middle of an episode, as a process does."""

    alive = False

    def step(self, action: np.ndarray) -> bool:
        if not DiesOnce.alive and self.sum > 5:
            DiesOnce.alive = True
            raise EOFError
        return super().step(action)


def test_a_worker_that_dies_is_replaced_and_its_episode_begins_again():
    expected = run([episode(), episode(1)], [Constant(1.0, "p")], workers=2)
    results: dict = {}
    run_episodes(
        [episode(), episode(1)],
        {"p": Constant(1.0, "p")},
        DiesOnce,
        workers=2,
        on_result=lambda result: results.update({result.episode: result}),
        crew=Threads(),
    )
    assert DiesOnce.alive
    for one, result in expected.items():
        assert dataclasses.replace(results[one], seconds=result.seconds) == result


def test_log_reads_back_and_drops_an_unfinished_line(tmp_path):
    log = EpisodeLog(tmp_path / "deep" / "episodes.jsonl")
    first = Result(
        episode=episode(),
        task_name="t",
        success=True,
        steps=9,
        seconds=0.5,
        positions=[[0.0, 0.1, 0.2]],
        deviations={"q": [0.5]},
    )
    log.append(first, policy="one")
    log.append(dataclasses.replace(first, episode=episode(state=1)), policy="one")
    text = log.path.read_text()
    log.path.write_text(text[:-20])
    again = EpisodeLog(log.path)
    assert list(again.results.values()) == [first]
    assert log.path.read_text() == text.splitlines()[0] + "\n"
    assert again.outcomes([episode(), episode(max_steps=5)]) == [first]
    line = json.loads(text.splitlines()[0])
    assert (line["policy"], line["task"], line["success"]) == ("one", 0, True)


def test_jerk_is_that_of_the_velocities():
    t = np.arange(8.0)[:, None]
    velocities = 0.5 * t**2 * [[1.0, 2.0, 2.0]]  # their second difference is (1, 2, 2)
    actions = np.concatenate([velocities, 9 * t**3, t, t, (-1) ** t], axis=1)
    assert jerk(list(actions)) == pytest.approx(3.0)
    assert jerk(list(actions[:2])) is None


def test_log_of_an_older_version_has_no_jerk(tmp_path):
    log = EpisodeLog(tmp_path / "episodes.jsonl")
    result = Result(episode=episode(), task_name="t", success=True, steps=9, seconds=0.5, jerk=2.0)
    log.append(result, policy="p")
    line = json.loads(log.path.read_text())
    del line["jerk"]
    log.path.write_text(json.dumps(line) + "\n")
    (read,) = EpisodeLog(log.path).results.values()
    assert read == dataclasses.replace(result, jerk=None)
    assert compare_motion([read], [result]).jerk is None


def test_damaged_log_names_its_line(tmp_path):
    path = tmp_path / "episodes.jsonl"
    EpisodeLog(path).append(
        Result(episode=episode(), task_name="t", success=True, steps=9, seconds=0.5), policy="p"
    )
    path.write_text(path.read_text() + '{"task": 1}\n')
    with pytest.raises(InputError, match=r"episodes.jsonl:2: not a line"):
        EpisodeLog(path)


def test_seeds_of_episodes_hang_on_nothing_else():
    seeds = {episode_seed(s, t, i) for s in range(3) for t in range(10) for i in range(50)}
    assert len(seeds) == 1500
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert episode_seed(1, 2, 3) == episode_seed(1, 2, 3)


@pytest.fixture
def in_threads(monkeypatch):
    run_in_processes = run_episodes
    monkeypatch.setattr(
        stage,
        "run_episodes",
        lambda *args, **options: run_in_processes(*args, **{**options, "crew": Threads()}),
    )


def simulate(out, policies, **changes):
    settings = {"tasks": (0, 1), "episodes_per_task": 3, "videos": False, "workers": 2}
    config = ClosedLoopConfig(
        sim="libero_spatial", out=out, policy=tuple(policies), **{**settings, **changes}
    )
    return to_plain(stage.closed_loop(config, policies=policies, make=Count))


def test_interrupted_run_goes_on_and_ends_in_the_same_tables(tmp_path, in_threads):
    def policies():
        return {"one": Constant(0.05, "a"), "two": Constant(1.0, "b")}

    whole = simulate(tmp_path / "whole", policies())
    lines = (tmp_path / "whole" / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 12
    part = tmp_path / "part"
    part.mkdir()
    (part / "episodes.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:30])
    again = policies()
    resumed = simulate(part, again)
    assert (part / "episodes.jsonl").read_text().splitlines()[:5] == lines[:5]
    assert {k: v for k, v in resumed.items() if k != "provenance"} == {
        k: v for k, v in whole.items() if k != "provenance"
    }
    finished = policies()
    simulate(part, finished)
    assert not finished["one"].batches
    assert len((part / "episodes.jsonl").read_text().splitlines()) == 12
    # Another setting that decides the outcome: nothing of the old run counts.
    simulate(part, finished, seed=1)
    assert len((part / "episodes.jsonl").read_text().splitlines()) == 24


def test_summary_pairs_episodes_and_counts_tasks(tmp_path, in_threads):
    # 220 steps of 0.05 reach 11: initial states 0 and 1 of task 0, none of task 1.
    content = simulate(tmp_path, {"one": Constant(1.0, "b"), "two": Constant(0.05, "a")})
    one, two = content["policies"]
    assert (one["overall"]["successes"], one["overall"]["episodes"]) == (6, 6)
    assert [task["successes"] for task in two["tasks"]] == [2, 0]
    (comparison,) = content["comparisons"]
    overall = comparison["overall"]
    assert (comparison["candidate"], comparison["reference"]) == ("two", "one")
    assert (overall["reference_only"], overall["candidate_only"], overall["both"]) == (4, 0, 2)
    assert overall["difference"] == pytest.approx(-4 / 6)
    assert overall["mcnemar_exact_p"] == pytest.approx(2 / 2**4)
    assert [task["reference_only"] for task in comparison["tasks"]] == [1, 3]
    assert content["settings"]["max_steps"] == 220
    # Four steps between decisions, of 1 and of 0.05: apart by 3.8 more each time.
    drift = comparison["drift"]
    np.testing.assert_allclose(drift["distance_median"][:3], [0.0, 3.8, 7.6], rtol=1e-5)
    np.testing.assert_allclose(drift["seconds"][:3], [0.0, 0.4, 0.8])
    np.testing.assert_allclose(
        drift["deviation_mean"][:2], np.array([1, 2]) * 4 * 7 * 0.475**2, rtol=1e-5
    )
    assert drift["deviation_episodes"] == 6
    motion = comparison["motion"]
    assert motion["pairs"] == 2
    log = EpisodeLog(tmp_path / "episodes.jsonl")
    solved = [{r.episode.pair: r.steps for r in log.results.values() if r.success
               and r.episode.policy_hash == policy} for policy in ("a", "b")]  # fmt: skip
    ratios = [solved[0][pair] / solved[1][pair] for pair in solved[0] if pair in solved[1]]
    assert motion["steps"]["mean"] == pytest.approx(np.prod(ratios) ** 0.5)
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "closed_loop.json").read_text()) == content


def test_a_video_of_each_kind_is_kept_once(tmp_path):
    result = Result(episode=episode(), task_name="t", success=True, steps=9, seconds=0.5)
    path = stage.video_path(tmp_path, "runs/x y", result)
    assert path == tmp_path / "runs_x_y_libero_spatial_00_success_00.mp4"
    path.touch()
    later = dataclasses.replace(result, episode=episode(state=4))
    assert stage.video_path(tmp_path, "runs/x y", later) is None
    failed = dataclasses.replace(later, success=False)
    assert stage.video_path(tmp_path, "runs/x y", failed).name.endswith("_failure_04.mp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sim": "libero_spacial"}, "did you mean libero_spatial"),
        ({"policy": ()}, "at least one policy"),
        ({"policy": ("a", "a")}, "named twice"),
        ({"episodes_per_task": 51}, "between 1 and 50"),
        ({"tasks": (0, 10)}, "tasks 0 to 9, got 10"),
        ({"workers": -1}, "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    settings = {"sim": "libero_spatial", "out": Path("x"), "policy": ("libero-mini",)}
    with pytest.raises(InputError, match=message):
        ClosedLoopConfig(**{**settings, **changes})
