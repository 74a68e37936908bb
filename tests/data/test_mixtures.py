"""Calibration sets of several data sets, and of a part of a large one."""

import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax import data, pipeline
from qvla_jax.cli import main
from qvla_jax.data import open_x
from qvla_jax.data.sampling import apportion
from qvla_jax.errors import DatasetError, InputError

if importlib.util.find_spec("tensorflow") is None:  # importing it takes seconds of every worker
    pytest.skip("writing RLDS needs TensorFlow (extra `rlds`)", allow_module_level=True)

from . import lerobot_sets
from . import open_x_sets as sets

# TensorFlow and Beam warn about their own dependencies.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets with 90, 30 and 8 frames; the second has no camera at the wrist."""
    root = tmp_path_factory.mktemp("root")
    sets.write(root, "taco_play", lengths=(30,) * 3)
    sets.write(root, "toto", lengths=(10,) * 3, seed=1)
    sets.write(root, "viola", lengths=(4, 4), seed=2)
    return root


def shares(calibration: data.CalibrationSet) -> dict[str, int]:
    names = [source["dataset"] for source in calibration.manifest["sources"]]
    return dict(Counter(names[place] for place in calibration.manifest["datasets"]))


def test_frames_are_shared_out_by_weight(root: Path) -> None:
    weights = {str(root / "taco_play"): 1.0, str(root / "toto"): 2.0, str(root / "viola"): 1.0}
    drawn = data.calibration_set(weights, frames=20)
    assert shares(drawn) == {"taco_play": 5, "toto": 10, "viola": 5}
    assert drawn.describe()["dataset"] == "taco_play, toto, viola"
    # viola has 8 frames; what it cannot give is shared out among the others.
    assert shares(data.calibration_set(weights, frames=50)) == {
        "taco_play": 14, "toto": 28, "viola": 8
    }  # fmt: skip
    with pytest.raises(DatasetError, match="129 frames asked for, the episodes looked at have 128"):
        data.calibration_set(weights, frames=129)


def test_balanced_weights_multiply_the_number_of_frames(root: Path) -> None:
    weights = {str(root / "taco_play"): 1.0, str(root / "toto"): 2.0}
    # 1 x 90 frames against 2 x 30.
    assert shares(data.calibration_set(weights, frames=10, balance=True)) == {
        "taco_play": 6, "toto": 4
    }  # fmt: skip


def test_a_share_below_one_frame_is_left_out_and_named(root: Path) -> None:
    drawn = data.calibration_set({str(root / "taco_play"): 1.0, str(root / "toto"): 0.01}, frames=6)
    assert shares(drawn) == {"taco_play": 6}
    assert drawn.manifest["left_out"] == ["toto"]


def test_batches_hold_what_all_sets_have(root: Path, tmp_path: Path) -> None:
    def batch(*names: str) -> dict:
        weights = {str(root / name): 1.0 for name in names}
        return next(data.calibration_set(weights, frames=8).batches(8))

    both = batch("taco_play", "viola")
    assert both["wrist_image"].shape == both["image"].shape == (8, sets.HEIGHT, sets.WIDTH, 3)
    assert both["state"].shape == (8, 8)
    assert both["actions"].shape == (8, 8, 7)
    assert "wrist_image" not in batch("taco_play", "toto")
    # RoboTurk has no proprio.
    sets.write(tmp_path, "roboturk")
    weights = {str(root / "toto"): 1.0, str(tmp_path / "roboturk"): 1.0}
    assert "state" not in next(data.calibration_set(weights, frames=4).batches(4))


def test_pictures_of_other_sizes_come_as_a_list_that_a_policy_takes(root: Path) -> None:
    from qvla_jax.inference import load_policy

    weights: dict[str, float] = {"bundled": 1.0, str(root / "viola"): 1.0}
    (batch,) = data.calibration_set(weights, frames=6).batches(6)
    assert isinstance(batch["image"], list)
    assert {image.shape[:2] for image in batch["image"]} == {(128, 128), (sets.HEIGHT, sets.WIDTH)}
    policy = load_policy("libero-mini")
    inputs = policy.prepare(batch)
    # Each as it would be on its own.
    for row in range(6):
        alone = {key: [value[row]] for key, value in batch.items()}
        np.testing.assert_array_equal(policy.prepare(alone).images[0], inputs.images[row])


def test_a_manifest_brings_a_mixture_back(root: Path, tmp_path: Path) -> None:
    weights = {str(root / "taco_play"): 1.0, str(root / "toto"): 1.0}
    drawn = data.calibration_set(weights, frames=10, seed=3)
    drawn.save(tmp_path / "calibration.json")
    again = data.CalibrationSet.from_manifest(tmp_path / "calibration.json")
    for one, other in zip(drawn.batches(4), again.batches(4), strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["actions"], other["actions"])
    assert drawn.redraw(frames=10, seed=3).manifest == drawn.manifest
    other_seed = drawn.redraw(frames=10, seed=4)
    assert other_seed.hash != drawn.hash
    assert shares(other_seed) == shares(drawn)
    with pytest.raises(InputError, match="a mixture; its data sets cannot all lie at"):
        data.CalibrationSet.from_manifest(drawn.manifest, source=root / "toto")


def test_the_draw_from_one_set_does_not_depend_on_how_it_is_named(root: Path) -> None:
    alone = data.calibration_set(root / "taco_play", frames=9, seed=2)
    weighted = data.calibration_set({str(root / "taco_play"): 0.3}, frames=9, seed=2)
    assert alone.hash == weighted.hash


def test_shared_data_are_noticed(root: Path) -> None:
    taco, toto = (str(root / name) for name in ("taco_play", "toto"))
    mixture = data.calibration_set({taco: 1.0, toto: 1.0}, frames=6)
    assert mixture.shares_data_with(data.calibration_set(toto, frames=2, seed=9))
    assert not mixture.shares_data_with(data.calibration_set(root / "viola", frames=2))
    calibration = data.calibration_set("bundled", frames=4)
    assert not calibration.shares_data_with(
        data.calibration_set("bundled", frames=4, split="heldout")
    )


def test_named_mixtures_are_looked_up_below_a_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.write(tmp_path, "bridge_orig")
    (tmp_path / "bridge_orig").rename(tmp_path / "bridge_dataset")
    found = open_x.mixture_below("bridge", tmp_path)
    assert found == {str(tmp_path / "bridge_dataset"): 1.0}
    with pytest.raises(DatasetError, match=r"'rtx' lacks fractal.*kuka.*jaco_play.*--weights"):
        open_x.mixture_below("rtx", root)


# A part of a large set.


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_only_some_files_of_a_large_set_are_read(tmp_path: Path, file_format: str) -> None:
    folder, _ = sets.write(tmp_path, "toto", lengths=(3,) * 12, shards=6, file_format=file_format)
    assert len(list(folder.glob("*-train*"))) == 6
    drawn = data.calibration_set(folder, frames=9, max_episodes=4)
    episodes = set(drawn.manifest["episodes"])
    assert len(episodes) == 4
    used = drawn.manifest["sources"][0]["files"]
    assert len(used) == 2
    # Every file that is not needed may be missing.
    for path in folder.glob("*-train*"):
        if path.name not in used:
            path.unlink()
    again = data.CalibrationSet.from_manifest(drawn.manifest)
    assert {tuple(batch["episode"]) for batch in again.batches(9)} == {
        tuple(batch["episode"]) for batch in drawn.batches(9)
    }
    assert drawn.redraw(frames=9, seed=0).hash == drawn.hash


def test_records_in_any_order_come_from_their_own_files(tmp_path: Path) -> None:
    readers = []
    for file_format in ("array_record", "tfrecord"):
        folder, columns = sets.write(
            tmp_path / file_format, "toto", lengths=(2, 3, 4, 2, 3, 4), shards=3,
            file_format=file_format,
        )  # fmt: skip
        readers.append(data.RldsDataset(folder))
    order = [5, 0, 0, 3, 1]
    for one, other in zip(*(reader.episodes(order) for reader in readers), strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.image, columns[one.id]["observation/image"])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 30)), min_size=1, max_size=6), st.data()
)
def test_shares_are_exact_within_capacity(pairs: list, draw: st.DataObject) -> None:
    weights, capacity = zip(*pairs, strict=True)
    total = draw.draw(st.integers(0, sum(capacity)))
    counts = apportion(total, weights, capacity)
    assert counts.sum() == total
    assert (counts <= capacity).all()
    # Whoever has room gets its share of what those that are full leave, to within a frame.
    room = counts < capacity
    if room.any():
        left = total - counts[~room].sum()
        quota = left * np.asarray(weights)[room] / np.asarray(weights)[room].sum()
        assert (np.abs(counts[room] - quota) <= 1 + 1e-9).all()


# The command.


def test_calibrate_takes_weights_a_spec_and_a_limit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["calibrate", "--frames", "6", "--max-episodes", "2", "--out", str(out)]
    taco, toto = (str(root / name) for name in ("taco_play", "toto"))
    assert main([*arguments, "--weights", taco, "1", toto, "2"]) == 0
    printed = capsys.readouterr().out
    assert "taco_play (train): 2 frames" in printed
    assert "toto (train): 4 frames" in printed
    assert pipeline.load_calibration(out).frames == 6
    shutil.copytree(root / "toto", tmp_path / "other" / "tato")
    info = tmp_path / "other" / "tato" / "0.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"toto"', '"tato"'))
    for file in info.parent.glob("toto-*"):
        file.rename(file.with_name(file.name.replace("toto-", "tato-")))
    unknown = ["--dataset", str(tmp_path / "other")]
    assert main([*arguments, *unknown]) == 2
    assert "unknown data set 'tato'" in capsys.readouterr().err
    assert main([*arguments, *unknown, "--spec", "toto"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixture", "rtx"], "--mixture needs the folder"),
        (["--dataset", "x", "--weights", "a", "1"], "no --dataset or --mixture beside"),
        (["--dataset", "x", "--mixture", "rtz"], "did you mean rtx"),
        (["--weights", "a", "0"], "weights of data sets must be positive"),
        (["--max-episodes", "0"], "--max-episodes must be at least 1"),
    ],
)
def test_calibrate_refuses_what_does_not_go_together(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *options, "--out", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_address_that_cannot_be_reached_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from etils import epath

    def refuse(self: epath.Path) -> bool:
        raise OSError("could not resolve host")

    monkeypatch.setattr(type(epath.Path("gs://bucket/set")), "exists", refuse)
    message = r"gs://bucket/set: cannot be reached \(could not resolve host\).*qvla-jax\[rlds\]"
    with pytest.raises(DatasetError, match=message):
        data.calibration_set("gs://bucket/set", frames=1)


# The documentation.

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def test_the_commands_in_the_docs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On synthetic sets where the docs have real ones, the whole training mixture included."""
    monkeypatch.chdir(tmp_path)
    for name in ("taco_play", "bridge_orig", "toto"):
        sets.write(Path("data"), name, lengths=(70, 70))
    for name in open_x.mixture("oxe_magic_soup_plus"):
        sets.write(Path("data/open_x"), name, lengths=(25, 5))
    lerobot_sets.write(Path("data/libero"), lerobot_sets.parts((70, 70)))
    joints = lerobot_sets.joint_parts("lerobot/aloha_sim_insertion_human", (70, 70))
    lerobot_sets.write(Path("data/aloha"), joints)
    example = DOCS.split("```json\n")[1].split("```")[0]
    Path("my_robot.json").write_text(example)
    structure = sets.Structure(
        {
            "action": "f4[8]",
            "language_instruction": "text",
            "observation": {
                "front_camera": "image",
                "hand_camera": "image",
                "joints": "f4[7]",
                "gripper": "f4[1]",
            },
        },
        {},
    )
    sets.write(Path("data"), "my_robot", structure=structure, lengths=(70, 70))
    commands = [line.split() for line in DOCS.splitlines() if line.startswith("    qvla ")]
    run = [command[1:] for command in commands if "gs://" not in " ".join(command)]
    run = [command for command in run if command[0] == "calibrate"]
    assert len(run) == len(commands) - 2 == 6
    for command in run:
        assert main(command) == 0, command
    assert "toto (train): 43 frames" in capsys.readouterr().out
    soup = pipeline.load_calibration(Path("runs/soup"))
    assert soup.frames == 512
    # All sets but Bridge have 30 frames; those of weight 2 and more give them all.
    drawn, weights = shares(soup), open_x.mixture("oxe_magic_soup_plus")
    assert set(drawn) == set(weights) - set(soup.manifest["left_out"])
    ones = [count for name, count in drawn.items() if weights[name] == 1 and name != "bridge_orig"]
    assert max(ones) - min(ones) <= 1
    assert {drawn[name] for name, weight in weights.items() if weight >= 2} == {30}
    assert drawn["droid"] == pytest.approx(0.06 * min(ones), abs=1)
    (batch, *_) = soup.batches(64)
    assert batch["actions"].shape == (64, 8, 7)
    code = DOCS.split("```python\n")[1].split("```")[0]
    names: dict = {}
    # RT-X is a part of the mixture that lies there.
    exec(code, names)
    assert names["calibration"].frames == 128
