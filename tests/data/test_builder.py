"""The RLDS builder, read back by the reader; writing needs TensorFlow."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from qvla_jax import data
from qvla_jax.data.libero.frames import save_rendered
from qvla_jax.data.libero.hdf5 import read_demonstrations
from qvla_jax.errors import DatasetError

if importlib.util.find_spec("tensorflow") is None:  # importing it takes seconds of every worker
    pytest.skip("writing RLDS needs TensorFlow (extra `rlds`)", allow_module_level=True)

from qvla_jax.data.libero.builder import BuildArgs, build, choose_splits

# TensorFlow and Beam warn about their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")


def identity(episode: data.Episode) -> tuple[str, int]:
    return episode.metadata["task"], episode.metadata["seed"]


@pytest.fixture
def built(demo_files: list[Path], tmp_path: Path) -> Path:
    return build(BuildArgs(demos=tuple(demo_files), out=tmp_path / "rlds", name="tiny"))


def test_round_trip(built: Path, demo_files: list[Path]) -> None:
    train, heldout = data.RldsDataset(built, "train"), data.RldsDataset(built, "heldout")
    assert (train.name, train.version, len(train), len(heldout)) == ("tiny", "1.0.0", 6, 2)
    demos = {
        (demo.task, demo.seed): demo for path in demo_files for demo in read_demonstrations(path)
    }
    seen = set()
    for episode in [*train.episodes(), *heldout.episodes()]:
        demo = demos[identity(episode)]
        seen.add(identity(episode))
        expected = demo.actions.astype(np.float32)
        np.testing.assert_array_equal(episode.action[:, :6], expected[:, :6])
        # The raw label is -1 for open and +1 for closed.
        np.testing.assert_array_equal(episode.action[:, 6] == 1, expected[:, 6] == -1)
        np.testing.assert_array_equal(episode.state, demo.proprio)
        np.testing.assert_array_equal(episode.joint_state, demo.joint_state)
        assert episode.instruction == demo.instruction
        assert episode.metadata["label_differs"] == (demo.seed or 0) % 2
        assert episode.image is not None
        assert episode.wrist_image is not None
        # Left to right the picture grows brighter, and darker in the wrist's.
        assert episode.image[0, 8, 15, 0] > 180 > 20 > episode.image[0, 8, 0, 0]
        assert episode.wrist_image[0, 8, 0, 0] > 180 > 20 > episode.wrist_image[0, 8, 15, 0]
    assert seen == set(demos)


def test_either_file_format_reads_the_same(
    built: Path, demo_files: list[Path], tmp_path: Path
) -> None:
    other = build(
        BuildArgs(demos=tuple(demo_files), out=tmp_path / "tf", name="tiny", file_format="tfrecord")
    )
    order = [4, 1, 1, 0, 5]
    one = list(data.RldsDataset(built, "train").episodes(order))
    two = list(data.RldsDataset(other, "train").episodes(order))
    assert [e.id for e in one] == [e.id for e in two] == order
    for a, b in zip(one, two, strict=True):
        for name in ("image", "wrist_image", "state", "joint_state", "action", "reward"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.instruction, dict(a.metadata)) == (b.instruction, dict(b.metadata))


def test_truncated_tfrecord_is_one_error(demo_files: list[Path], tmp_path: Path) -> None:
    folder = build(BuildArgs(demos=tuple(demo_files), out=tmp_path, file_format="tfrecord"))
    path = next(folder.glob("*-train.tfrecord-*"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match="truncated or damaged"):
        list(data.RldsDataset(folder, "train").episodes())


def test_tensorflow_sees_no_accelerator(demo_files: list[Path], tmp_path: Path) -> None:
    import tensorflow as tf

    folder = build(BuildArgs(demos=tuple(demo_files), out=tmp_path, file_format="tfrecord"))
    list(data.RldsDataset(folder, "heldout").episodes())
    assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}


def test_sample_holds_out_the_same_episodes(built: Path, demo_files: list[Path]) -> None:
    args = BuildArgs(
        demos=tuple(demo_files), out=built.parent, name="sample", splits="sample", calibration=2
    )
    sample = build(args)
    held = [identity(e) for e in data.RldsDataset(sample, "heldout").episodes(images=False)]
    assert held == [identity(e) for e in data.RldsDataset(built, "heldout").episodes(images=False)]
    calibration = data.RldsDataset(sample, "calibration")
    trained = {identity(e) for e in data.RldsDataset(built, "train").episodes(images=False)}
    assert {identity(e) for e in calibration.episodes(images=False)} < trained
    assert len(calibration) == 4


def test_splits_follow_the_seed_and_the_task_alone(demo_files: list[Path]) -> None:
    demos = [demo for path in demo_files for demo in read_demonstrations(path)]

    def held(chosen_from: list, seed: int) -> list[str]:  # type: ignore[type-arg]
        args = BuildArgs(demos=(), out=Path(), seed=seed)
        return [demo.key for demo in choose_splits(chosen_from, args)["heldout"]]

    assert held(demos, 0) == held(demos[::-1], 0)
    assert held(demos[:4], 0) == held(demos, 0)[1:]  # The second task by name comes first here.
    assert len({tuple(held(demos, seed)) for seed in range(10)}) > 1


def test_rendered_frames_complete_a_file_of_states(
    demo_files: list[Path], states_file: Path, tmp_path: Path
) -> None:
    frames = tmp_path / "frames"
    args = BuildArgs(
        demos=(*demo_files, states_file), frames=(frames,), out=tmp_path / "out", name="both"
    )
    with pytest.raises(DatasetError, match=r"2 demonstrations have no frames.*render"):
        build(args)
    for demo in read_demonstrations(states_file):
        picture = np.full((len(demo), 16, 16, 3), 90, np.uint8)
        save_rendered(frames, demo, picture, picture)
    dataset = data.RldsDataset(build(args), "train")
    assert len(dataset) == 8
    files = {str(e.metadata["file_path"]).split(":")[0] for e in dataset.episodes(images=False)}
    assert "states.hdf5" in files or len(files) == 2
    with pytest.raises(DatasetError, match="exists already"):
        build(args)


def test_too_few_demonstrations_are_refused(demo_files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="4 demonstrations, at least 5 needed"):
        build(BuildArgs(demos=tuple(demo_files), out=tmp_path, heldout=4))
    with pytest.raises(DatasetError, match="no demonstrations given"):
        build(BuildArgs(demos=(), out=tmp_path))
