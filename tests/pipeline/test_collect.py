"""Which episodes `qvla collect` runs, keeps and writes; no simulator is needed."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from qvla_jax import data
from qvla_jax.data.libero.recorded import Recording, save_recording
from qvla_jax.errors import DatasetError, InputError, QvlaError
from qvla_jax.evaluation.libero import ExpertPolicy, expert_hash, noise_of
from qvla_jax.families.prismatic.config import preset
from qvla_jax.pipeline import collect as stage
from qvla_jax.pipeline.collect import CollectConfig

from ..simulators import Threads

# TensorFlow and Beam warn about their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")


class Coin:
    """Done after three steps where the seed is even; task 1 is never done."""

    def __init__(self, episode):
        self.name, self.task = f"task_{episode.task}", episode.task

    def reset(self, initial_state, *, seed):
        assert initial_state is None
        self.seed, self.steps = seed, 0

    def observe(self):
        return {"action": np.ones(7), "instruction": self.name}

    def render(self, camera):
        raise NotImplementedError

    def step(self, action):
        self.steps += 1
        return self.task != 1 and self.seed % 2 == 0 and self.steps == 3

    def close(self):
        pass


class Still:
    """A policy whose actions are not the labels."""

    fingerprint = "abcdef"

    def __init__(self):
        self.config, self.observation = preset("tiny-test"), SimpleNamespace(image_size=8)
        self.layout = SimpleNamespace(executed_steps=None)

    def infer_normalized(self, batch):
        return np.zeros((len(batch["instruction"]), 4, 7), np.float32)

    def standard_actions(self, actions, state=None):
        return actions


def keep(environment, episode, actions, path):
    """Writes pictures that tell the seed."""
    recording = Recording.empty(
        task=environment.name, instruction=environment.name, seed=episode.seed
    )
    shade = np.full((episode.size, episode.size, 3), episode.seed % 200, np.uint8)
    for action in actions:
        seen = {"image": shade, "wrist_image": shade, "state": np.zeros(8)}
        recording.add(seen, joints=np.zeros(7), label=np.ones(7))
        recording.executed.append(np.float32(action))
    recording.success = len(actions) == 3
    save_recording(path, recording)


@pytest.fixture
def collect(monkeypatch, tmp_path):
    pytest.importorskip("tensorflow", reason="writing RLDS needs TensorFlow (extra `rlds`)")
    in_processes = stage.run_episodes
    ran = []

    def in_threads(episodes, *args, **options):
        ran.extend(episodes)
        return in_processes(episodes, *args, **{**options, "crew": Threads()})

    monkeypatch.setattr(stage, "run_episodes", in_threads)

    def run(actor, **changes):
        ran.clear()
        settings = {"tasks": (0, 2), "episodes_per_task": 3, "workers": 2, "size": 16}
        config = CollectConfig(**{"sim": "libero_spatial", "out": tmp_path, **settings, **changes})
        return stage.collect(config, policy=actor, make=Coin, keep=keep), list(ran)

    return run


def read(folder, *splits):
    return [e for split in splits for e in data.RldsDataset(folder, split).episodes()]


def test_expert_keeps_successes_until_there_are_enough(collect):
    collected, ran = collect(ExpertPolicy())
    assert all(result.success for result in collected.kept)
    assert [r.episode.task for r in collected.kept] == [0, 0, 0, 2, 2, 2]
    assert len(collected.results) == len(ran) > 6  # Some were tried in vain.
    assert len(read(collected.folder, "heldout")) == 2
    episodes = read(collected.folder, "train", "heldout")
    assert {e.metadata["seed"] for e in episodes} == {r.episode.seed for r in collected.kept}
    for episode in episodes:
        assert len(episode) == 3
        assert episode.reward.tolist() == [0, 0, 1]
        assert episode.metadata["success"]
        assert episode.metadata["policy"] == "expert"
        assert episode.metadata["noise_sigma"] == pytest.approx(
            noise_of(episode.metadata["seed"], (0.0, 0.06, 0.12))
        )
        assert abs(int(episode.image[0, 0, 0, 0]) - episode.metadata["seed"] % 200) <= 2


def test_policy_keeps_failures_and_the_label_stays_the_experts(collect):
    collected, ran = collect(Still(), policy="mini", heldout=0)
    assert len(ran) == len(collected.kept) == 6
    episodes = read(collected.folder, "train")
    assert {bool(e.metadata["success"]) for e in episodes} == {True, False}
    for episode in episodes:
        assert (episode.action == [1, 1, 1, 1, 1, 1, 0]).all()  # Closed.
        assert episode.metadata["label_differs"]
        assert (episode.metadata["policy"], episode.metadata["noise_sigma"]) == ("mini", 0)
        assert episode.reward[-1] == episode.metadata["success"]
        assert len(episode) == (3 if episode.metadata["success"] else 220)


def test_finished_episodes_are_not_run_again(collect, tmp_path):
    first, _ = collect(Still(), name="first")
    again, ran = collect(Still(), name="again")
    assert ran == []
    assert again.kept == first.kept
    # Killed between the end of an episode and its recording.
    lost = sorted((tmp_path / "episodes").glob("*/*.npz"))[0]
    lost.unlink()
    third, ran = collect(Still(), name="third")
    assert [e.seed for e in ran] == [int(lost.stem.split("_")[-3])]
    assert [r.episode for r in third.kept] == [r.episode for r in first.kept]
    more, ran = collect(Still(), name="more", episodes_per_task=4)
    assert len(ran) == 2
    assert len(more.kept) == 8
    lines = (tmp_path / "episodes" / "episodes.jsonl").read_text().splitlines()
    assert all(json.loads(line)["initial_state"] is None for line in lines)


def test_suites_in_one_folder_keep_their_own_recordings(collect, tmp_path):
    first, _ = collect(Still())
    other, ran = collect(Still(), sim="libero_object")
    assert len(ran) == 6
    assert len(list((tmp_path / "episodes").glob("*/*.npz"))) == 12
    assert first.folder != other.folder
    # Failures last as long as the suite lets them.
    assert {len(e) for e in read(other.folder, "train")} == {3, 280}
    _, ran = collect(Still(), name="again")
    assert ran == []


def test_a_task_that_never_succeeds_ends_with_its_counts(collect):
    with pytest.raises(QvlaError, match=r"task 1: 0 of \d+ episodes succeeded, 2 are wanted"):
        collect(ExpertPolicy(), tasks=(1,), episodes_per_task=2)


def test_an_existing_set_is_refused_before_anything_runs(collect, tmp_path):
    (tmp_path / "libero_spatial").mkdir()
    with pytest.raises(DatasetError, match="exists already"):
        collect(Still())
    assert not (tmp_path / "episodes").exists()


def test_noise_is_part_of_the_experts_name():
    assert expert_hash((0.0,)) == ExpertPolicy().fingerprint
    assert expert_hash((0.0, 0.1)) != expert_hash((0.0,))
    assert {noise_of(seed, (0.0, 0.1)) for seed in range(5)} == {0.0, 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sim": "libero_object", "tasks": (10,)}, "tasks 0 to 9, got 10"),
        ({"heldout": 3}, "heldout must lie"),
        ({"noise": ()}, "at least one"),
        ({"noise": (-0.1,)}, "negative"),
    ],
)
def test_impossible_settings_are_refused(changes, message, tmp_path):
    config = CollectConfig(sim="libero_spatial", out=tmp_path, episodes_per_task=3)
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **changes)
