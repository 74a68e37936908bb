"""Calibration sets: what is drawn, and that a manifest brings it back."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax import data
from qvla_jax.data.sampling import interleave, spread, stratified
from qvla_jax.errors import DatasetError, InputError


def test_a_stride_takes_the_steps_at_which_a_policy_looks() -> None:
    calibration = data.calibration_set("bundled", trajectories=3, stride=8)
    dataset = data.RldsDataset(data.bundled_path(), "calibration")
    steps: dict[int, list[int]] = {}
    for episode, step in zip(
        calibration.manifest["episodes"], calibration.manifest["steps"], strict=True
    ):
        steps.setdefault(episode, []).append(step)
    assert len(steps) == 3
    for episode in dataset.episodes(sorted(steps)):
        assert sorted(steps[episode.id]) == list(range(0, len(episode), 8))
    with pytest.raises(InputError, match="a stride goes with whole trajectories"):
        data.calibration_set("bundled", frames=8, stride=8)


def test_frames_are_spread_over_tasks_and_episodes() -> None:
    calibration = data.calibration_set("bundled", frames=128, seed=0)
    assert calibration.frames == len(calibration) == 128
    per_episode = Counter(calibration.manifest["episodes"])
    assert len(per_episode) == 20
    assert set(per_episode.values()) == {6, 7}
    pairs = zip(calibration.manifest["episodes"], calibration.manifest["steps"], strict=True)
    assert len(set(pairs)) == 128


def test_a_share_of_the_frames_lies_where_the_gripper_opens_or_closes() -> None:
    def deciding(drawn: data.CalibrationSet) -> int:
        (batch,) = drawn.batches(64)
        gripper = batch["actions"][..., 6]
        return int(np.sum(gripper.max(axis=1) != gripper.min(axis=1)))

    shared = data.calibration_set("bundled", frames=64, gripper_share=0.75)
    assert deciding(shared) == 48
    assert len(set(shared.manifest["episodes"])) == 20
    assert deciding(data.calibration_set("bundled", frames=64, gripper_share=0)) == 0
    assert deciding(data.calibration_set("bundled", frames=64, gripper_share=1)) == 64
    with pytest.raises(InputError, match="between 0 and 1"):
        data.calibration_set("bundled", frames=64, gripper_share=1.5)
    with pytest.raises(InputError, match="give `frames`"):
        data.calibration_set("bundled", trajectories=3, gripper_share=0.5)
    with pytest.raises(DatasetError, match="frames where the gripper opens or closes asked for"):
        data.calibration_set("bundled", frames=1500, gripper_share=1)


def test_first_frames_of_a_set_come_from_several_tasks() -> None:
    (batch, *_) = data.calibration_set("bundled", frames=64, seed=3).batches(16)
    assert len(set(batch["instruction"])) >= 5


def test_default_is_128_frames_and_the_draw_follows_the_seed() -> None:
    first, again = data.calibration_set(), data.calibration_set(seed=0)
    assert first.frames == 128
    assert first.manifest == again.manifest
    assert first.hash != data.calibration_set(seed=1).hash


def test_every_frame_has_a_seed_of_its_own() -> None:
    drawn = data.calibration_set("bundled", frames=12)
    (whole,) = drawn.batches(12)
    assert whole["seed"].shape == (12,)
    assert len(set(whole["seed"].tolist())) == 12
    parts = np.concatenate([batch["seed"] for batch in drawn.batches(5)])
    np.testing.assert_array_equal(parts, whole["seed"])
    (other,) = data.calibration_set("bundled", frames=12, seed=1).batches(12)
    assert not set(other["seed"].tolist()) & set(whole["seed"].tolist())


def test_batches_hold_what_a_policy_takes() -> None:
    calibration = data.calibration_set("bundled", frames=10, horizon=4)
    batches = list(calibration.batches(4))
    assert [len(batch["instruction"]) for batch in batches] == [4, 4, 2]
    batch = batches[0]
    assert batch["image"].shape == batch["wrist_image"].shape == (4, 128, 128, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["state"].shape == (4, 8)
    assert batch["actions"].shape == (4, 4, 7)
    assert batch["actions"].dtype == batch["state"].dtype == np.float32
    assert set(np.unique(batch["actions"][..., 6])) <= {0.0, 1.0}
    assert batch["episode"].dtype == batch["step"].dtype == np.int64


def test_a_frame_is_the_step_of_the_episode_that_the_manifest_names() -> None:
    calibration = data.calibration_set("bundled", frames=5, horizon=3)
    dataset = data.RldsDataset(data.bundled_path(), "calibration")
    (batch,) = calibration.batches(5)
    for row in range(5):
        episode, step = int(batch["episode"][row]), int(batch["step"][row])
        (source,) = dataset.episodes([episode])
        frame = source.frame(step, 3)
        np.testing.assert_array_equal(batch["image"][row], frame.image)
        np.testing.assert_array_equal(batch["state"][row], frame.state)
        np.testing.assert_array_equal(batch["actions"][row, :, :6], frame.actions[:, :6])
        assert batch["instruction"][row] == frame.instruction


def test_trajectories_come_whole_and_from_different_tasks() -> None:
    calibration = data.calibration_set("bundled", trajectories=10)
    dataset = data.RldsDataset(data.bundled_path(), "calibration")
    chosen = set(calibration.manifest["episodes"])
    assert len(chosen) == calibration.manifest["trajectories"] == 10
    assert calibration.frames == sum(dataset.lengths[i] for i in chosen)
    names = {e.instruction for e in dataset.episodes(sorted(chosen), images=False)}
    assert len(names) == 10


def test_manifest_brings_back_exactly_the_same_set(tmp_path: Path) -> None:
    calibration = data.calibration_set("bundled", frames=20, seed=5)
    calibration.save(tmp_path / "calibration.json")
    rebuilt = data.CalibrationSet.from_manifest(tmp_path / "calibration.json")
    assert rebuilt.manifest == calibration.manifest
    for one, other in zip(calibration.batches(7), rebuilt.batches(7), strict=True):
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])


def test_a_moved_data_set_keeps_its_calibration_set(tmp_path: Path) -> None:
    shutil.copytree(data.bundled_path(), tmp_path / "moved")
    calibration = data.calibration_set("bundled", frames=6)
    moved = data.calibration_set(tmp_path / "moved", frames=6)
    assert moved.hash == calibration.hash
    again = data.CalibrationSet.from_manifest(calibration.manifest, source=tmp_path / "moved")
    assert again.hash == calibration.hash


def test_changed_data_are_refused(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data.bundled_path(), copy)
    manifest = data.calibration_set(copy, frames=6).manifest
    path = next(copy.glob("*-calibration.array_record-*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"not those it was drawn from .*array_record"):
        data.CalibrationSet.from_manifest(manifest)


def test_altered_or_foreign_manifests_are_refused(tmp_path: Path) -> None:
    manifest = dict(data.calibration_set("bundled", frames=6).manifest)
    with pytest.raises(DatasetError, match="altered"):
        data.CalibrationSet.from_manifest({**manifest, "steps": manifest["steps"][::-1]})
    with pytest.raises(DatasetError, match=r"format 1, this .* draw"):
        data.CalibrationSet.from_manifest({**manifest, "format": 1})
    with pytest.raises(DatasetError, match="not a calibration manifest"):
        data.CalibrationSet.from_manifest({"frames": 3})
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(manifest)[:-20])
    with pytest.raises(DatasetError, match="cannot be read as JSON"):
        data.CalibrationSet.from_manifest(path)


def test_asking_for_too_much_or_too_little_is_an_error() -> None:
    with pytest.raises(DatasetError, match="100000 frames asked for, 20 episodes"):
        data.calibration_set("bundled", frames=100_000)
    with pytest.raises(DatasetError, match="21 trajectories asked for"):
        data.calibration_set("bundled", trajectories=21)
    with pytest.raises(InputError, match="frames must be at least 1, got 0"):
        data.calibration_set("bundled", frames=0)
    with pytest.raises(InputError, match="batch size"):
        next(data.calibration_set("bundled", frames=1).batches(0))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.data())
def test_spread_is_exact_within_capacity_and_even(capacity: list[int], draw: st.DataObject) -> None:
    total = draw.draw(st.integers(0, sum(capacity)))
    counts = spread(total, np.asarray(capacity, np.int64))
    assert counts.sum() == total
    assert (counts <= np.asarray(capacity)).all()
    # Whoever has room has at most one less than whoever has most.
    room = [int(n) for n, most in zip(counts, capacity, strict=True) if n < most]
    assert not room or min(room) >= counts.max() - 1


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.data())
def test_stratified_steps_differ_and_stay_inside(
    length: int, seed: int, draw: st.DataObject
) -> None:
    count = draw.draw(st.integers(0, length))
    steps = stratified(length, count, np.random.default_rng(seed))
    assert len(steps) == count
    assert (np.diff(steps) > 0).all()
    assert count == 0 or (steps[0] >= 0 and steps[-1] < length)


@given(st.lists(st.integers(0, 6), max_size=6))
def test_interleave_takes_turns(sizes: list[int]) -> None:
    groups = [np.full(size, label) for label, size in enumerate(sizes)]
    order = interleave(groups)
    assert sorted(order) == [label for label, size in enumerate(sizes) for _ in range(size)]
    full = [label for label, size in enumerate(sizes) if size]
    assert order[: len(full)] == full
