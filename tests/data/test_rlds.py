"""The reader, on the bundled sample."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax import data
from qvla_jax.data.episode import next_steps
from qvla_jax.errors import DatasetError, InputError, QvlaError


@pytest.fixture(scope="module")
def heldout() -> data.RldsDataset:
    return data.RldsDataset(data.bundled_path(), "heldout")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sample that a test may damage."""
    target = tmp_path / "copy"
    shutil.copytree(data.bundled_path(), target)
    return target


def shard(folder: Path, split: str) -> Path:
    return next(folder.glob(f"*-{split}.array_record-*"))


def test_bundled_splits_are_disjoint_and_cover_the_ten_tasks() -> None:
    keys = {}
    for split, count in (("calibration", 20), ("heldout", 10)):
        dataset = data.RldsDataset(data.bundled_path(), split)
        episodes = list(dataset.episodes(images=False))
        assert len(dataset) == len(episodes) == count
        assert len({episode.instruction for episode in episodes}) == 10
        keys[split] = {(e.metadata["task"], e.metadata["seed"]) for e in episodes}
        assert len(keys[split]) == count
    assert not keys["calibration"] & keys["heldout"]


def test_episode_has_the_shapes_and_types_it_promises(heldout: data.RldsDataset) -> None:
    episode = next(heldout.episodes())
    t = len(episode)
    assert episode.image is not None
    assert episode.wrist_image is not None
    assert episode.state is not None
    assert episode.joint_state is not None
    assert episode.image.shape == episode.wrist_image.shape == (t, 128, 128, 3)
    assert episode.image.dtype == np.uint8
    assert episode.image.std() > 20  # A scene, not a blank.
    assert episode.state.shape == (t, 8)
    assert episode.joint_state.shape == (t, 7)
    assert episode.action.shape == (t, 7)
    assert episode.action.dtype == episode.state.dtype == np.float32
    assert set(np.unique(episode.action[:, 6])) == {0.0, 1.0}
    assert episode.instruction.startswith("pick up the black bowl")
    assert episode.reward.tolist() == [0.0] * (t - 1) + [1.0]
    assert episode.is_terminal.tolist() == [False] * (t - 1) + [True]
    assert set(episode.metadata) >= {"file_path", "seed", "noise_sigma", "label_differs"}


def test_label_differs_exactly_where_noise_was_executed(heldout: data.RldsDataset) -> None:
    for episode in heldout.episodes(images=False):
        assert episode.metadata["label_differs"] == (episode.metadata["noise_sigma"] > 0)


def test_without_images_everything_else_is_the_same(heldout: data.RldsDataset) -> None:
    (full,), (lean,) = heldout.episodes([3]), heldout.episodes([3], images=False)
    assert lean.image is None
    assert np.array_equal(full.action, lean.action)
    assert full.id == lean.id == 3


def test_indices_are_read_in_the_order_given(heldout: data.RldsDataset) -> None:
    assert [e.id for e in heldout.episodes([7, 0, 7], images=False)] == [7, 0, 7]
    assert list(heldout.episodes([], images=False)) == []
    with pytest.raises(DatasetError, match="from 0 to 9, got 10 to 10"):
        next(heldout.episodes([10]))


def test_a_seed_decides_the_order(heldout: data.RldsDataset) -> None:
    def order(seed: int | None) -> list[int]:
        return [episode.id for episode in heldout.episodes(images=False, seed=seed)]

    assert order(None) == list(range(10))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(10))


def test_frames_are_complete_and_deterministic_when_mixed(heldout: data.RldsDataset) -> None:
    def keys(seed: int | None) -> list[tuple[int, int]]:
        frames = heldout.frames(4, indices=[0, 1, 2], seed=seed, shuffle_episodes=2)
        return [(frame.episode, frame.step) for frame in frames]

    assert keys(0) == keys(0) != keys(1)
    assert sorted(keys(0)) == keys(None)
    assert len(keys(None)) == sum(heldout.lengths[i] for i in range(3))


def test_frame_repeats_the_last_action_past_the_end(heldout: data.RldsDataset) -> None:
    (episode,) = heldout.episodes([0], images=False)
    frame = episode.frame(len(episode) - 2, horizon=5)
    expected = episode.action[[-2, -1, -1, -1, -1]]
    np.testing.assert_array_equal(frame.actions, expected)


@given(st.integers(1, 30), st.integers(1, 12), st.data())
def test_next_steps_stay_inside(length: int, horizon: int, draw: st.DataObject) -> None:
    step = draw.draw(st.integers(0, length - 1))
    (steps,) = next_steps(np.asarray([step]), length, horizon)
    assert steps.tolist() == [min(step + i, length - 1) for i in range(horizon)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13])
def test_processes_partition_the_split(count: int) -> None:
    shares = [
        data.RldsDataset(
            data.bundled_path(), "heldout", process_index=index, process_count=count
        ).episode_ids.tolist()
        for index in range(count)
    ]
    assert sorted(index for share in shares for index in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_process_index_is_checked() -> None:
    with pytest.raises(InputError, match=r"process_index 2 is not in \[0, 2\)"):
        data.RldsDataset(data.bundled_path(), "heldout", process_index=2, process_count=2)


def test_a_parent_directory_is_resolved_if_unambiguous(copy: Path, tmp_path: Path) -> None:
    nested = tmp_path / "root" / "libero_spatial" / "1.0.0"
    nested.parent.mkdir(parents=True)
    copy.rename(nested)
    assert data.RldsDataset(tmp_path / "root", "heldout").path == nested
    shutil.copytree(nested, nested.with_name("1.1.0"))
    with pytest.raises(DatasetError, match="several data sets"):
        data.RldsDataset(tmp_path / "root", "heldout")


def test_missing_directory_and_split_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such directory"):
        data.RldsDataset(tmp_path / "absent")
    with pytest.raises(DatasetError, match="not an RLDS data set"):
        data.RldsDataset(tmp_path)
    with pytest.raises(DatasetError, match="no split 'train'; it has calibration, heldout"):
        data.RldsDataset(data.bundled_path(), "train")


def test_missing_keys_are_listed_beside_those_there_are(
    copy: Path, edit_json: Callable[[Path, str, str], None]
) -> None:
    edit_json(copy / "features.json", '"wrist_image"', '"hand_image"')
    with pytest.raises(DatasetError, match=r"lack observation/wrist_image, .*hand_image"):
        data.RldsDataset(copy, "heldout")


def test_a_set_that_is_not_rlds_says_so(
    copy: Path, edit_json: Callable[[Path, str, str], None]
) -> None:
    edit_json(copy / "features.json", '"steps"', '"examples"')
    with pytest.raises(DatasetError, match="no 'steps'"):
        data.RldsDataset(copy, "heldout")


def test_unreadable_description_is_one_error(copy: Path) -> None:
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(DatasetError, match="unreadable"):
        data.RldsDataset(copy, "heldout")


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbled", "missing"])
def test_damaged_files_end_in_one_error(copy: Path, damage: str) -> None:
    path = shard(copy, "heldout")
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "truncated": content[:half],
                "empty": b"",
                "garbled": content[:half] + bytes(3000) + content[half + 3000 :],
            }[damage]
        )
    dataset = data.RldsDataset(copy, "heldout")
    with pytest.raises(DatasetError, match=r"missing|truncated or damaged"):
        list(dataset.episodes(images=False))


def test_reading_needs_no_tensorflow() -> None:
    """In a process where TensorFlow cannot be found, as in a default installation."""
    program = """
import sys
from importlib.machinery import PathFinder

class WithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] in ("tensorflow", "keras")
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
from qvla_jax import data
assert len(list(data.RldsDataset(data.bundled_path(), "heldout").episodes())) == 10
assert data.calibration_set("bundled", frames=8).frames == 8
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys; from qvla_jax import data; dir(data); "
        "heavy = {'jax', 'tensorflow', 'tensorflow_datasets', 'h5py', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_errors_are_the_librarys_own() -> None:
    assert issubclass(DatasetError, QvlaError)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing  # type: ignore[attr-defined]
