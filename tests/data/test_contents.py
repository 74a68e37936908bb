"""Sets that hold what they should not: one error with set, episode, step and feature, or no change.

Wherever frames are read: calibration, evaluation and training sets, mixtures, statistics.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax import data, pipeline
from qvla_jax.cli import main
from qvla_jax.errors import DatasetError

from . import small_sets as sets
from .small_sets import ACTION, IMAGE, STATE, TEXT, WRIST

f = tfds.features

Folders = Callable[[], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Makes names of new folders."""
    root, numbers = tmp_path_factory.mktemp("small"), itertools.count()
    return lambda: root / f"set{next(numbers)}"


def read(folder: Path) -> dict[str, Any]:
    """All frames, in the order of their episodes and steps."""
    (batch,) = data.calibration_set(folder, trajectories="all", horizon=1).batches(99)
    order = np.lexsort((batch["step"], batch["episode"]))
    return {
        name: np.asarray(values)[order] if name != "instruction" else [values[i] for i in order]
        for name, values in batch.items()
    }


def unchanged(folder: Path, steps: list[list[sets.Step]], pictures: bool = True) -> None:
    """Checks that a set reads as it was written."""
    batch = read(folder)
    flat = [step for episode in steps for step in episode]
    assert batch["instruction"] == [step[TEXT] for step in flat]
    state = np.stack([np.asarray(step[STATE], np.float32) for step in flat])
    np.testing.assert_array_equal(batch["state"], state)
    actions = np.stack([np.asarray(step[ACTION], np.float32) for step in flat])
    np.testing.assert_array_equal(batch["actions"][:, 0, :6], actions[:, :6])
    np.testing.assert_array_equal(batch["actions"][:, 0, 6], actions[:, 6] < 0)
    if pictures:
        numbers = [100 * e + t for e, episode in enumerate(steps) for t in range(len(episode))]
        expected = np.stack([sets.picture(number) for number in numbers])
        np.testing.assert_array_equal(batch["image"], expected)
        expected = np.stack([sets.picture(number + 50) for number in numbers])
        np.testing.assert_array_equal(batch["wrist_image"], expected)


def refused(folder: Path, rest: str) -> None:
    """Checks that there is one error, which begins with the set and goes on as expected."""
    with pytest.raises(DatasetError) as caught:
        read(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert re.match(rest, message.removeprefix(f"{folder}: ")), message


PNG = sets.file_of(sets.picture(0))
JPEG = sets.file_of(sets.picture(0), "JPEG")
DEEP = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1000

# Values of one step that cannot be used, by the feature they are in.
NUMBERS = [np.nan, np.inf, -np.inf]
NOT_PICTURES = {
    "cut PNG": PNG[:-20],
    "cut JPEG": JPEG[:-20],
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "a flipped byte": PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:],
    "empty": b"",
    "text": b"hello world",
    "zeros": bytes(99),
    "an array's bytes": sets.picture(0).tobytes(),
    "16-bit grayscale": sets.file_of(DEEP),
    "TIFF": sets.file_of(sets.picture(0), "TIFF"),
    "another size": sets.file_of(sets.picture(0)[:4]),
}
NOT_TEXTS = {
    "empty": "",
    "blank": " \t\n",
    "not UTF-8": b"pick up the caf\xe9",
    "UTF-16": "pick up".encode("utf-16"),
    "bytes as text": "b'pick up object 1'",
    "a list as text": "[b'pick up', b'lift']",
    "an array as text": "[0. 0.5 1e-3]",
    "NULs": "pick up\0\0",
}


@settings(deadline=None, max_examples=60)
@given(place=st.data())
def test_a_bad_value_anywhere_is_named_with_its_place(
    place: st.DataObject, folders: Folders
) -> None:
    steps = sets.episodes((3, 4))
    episode = place.draw(st.integers(0, 1), "episode")
    step = place.draw(st.integers(0, len(steps[episode]) - 1), "step")
    feature = place.draw(st.sampled_from([IMAGE, WRIST, STATE, ACTION, TEXT]), "feature")
    where = f"episode {episode} of 'train': step {step}: {feature}: "
    if feature in (STATE, ACTION):
        value = steps[episode][step][feature]
        entry = place.draw(st.integers(0, len(value) - 1), "entry")
        value[entry] = place.draw(st.sampled_from(NUMBERS), "value")
        where += rf"entry {entry} is {value[entry]}"
    else:
        kinds = NOT_TEXTS if feature == TEXT else NOT_PICTURES
        kind = place.draw(st.sampled_from(sorted(kinds)), "kind")
        steps[episode][step][feature] = kinds[kind]
    refused(sets.write(folders(), steps), where)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_without_a_bad_value_the_set_reads_as_written(folders: Folders, file_format: str) -> None:
    if file_format == "tfrecord":
        pytest.importorskip("tensorflow", reason="TFRecord needs TensorFlow (extra `rlds`)")
    unchanged(sets.write(folders(), file_format=file_format), sets.episodes())


@pytest.mark.parametrize(
    ("feature", "value", "rest"),
    [
        (WRIST, NOT_PICTURES["cut JPEG"], "the picture does not decode"),
        (STATE, np.full(8, np.nan, np.float32), "entry 0 is nan"),
        (TEXT, "", "the instruction is empty, at step 0 it is 'pick up object 1'"),
        (TEXT, NOT_TEXTS["not UTF-8"], "the instruction .* is not UTF-8"),
    ],
)
def test_tfrecord_files_give_the_same_errors(
    folders: Folders, feature: str, value: Any, rest: str
) -> None:
    pytest.importorskip("tensorflow", reason="TFRecord needs TensorFlow (extra `rlds`)")
    steps = sets.episodes()
    steps[1][2][feature] = value
    folder = sets.write(folders(), steps, file_format="tfrecord")
    refused(folder, f"episode 1 of 'train': step 2: {feature}: {rest}")


# Dtypes and shapes, which the description tells.

DTYPES = [
    *(np.dtype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4")),
    np.dtype(bool),
    np.str_,
]


def tensor(shape: tuple[int | None, ...], dtype: Any) -> Any:
    # TFDS keeps 64-bit floats only where it stores their bytes.
    encoding = "zlib" if dtype in (np.dtype("f8"), np.dtype("f2")) else "none"
    return f.Tensor(shape=shape, dtype=dtype, encoding=encoding)


def filled(shape: tuple[int, ...], dtype: Any) -> Any:
    return np.full(shape, "1" if dtype is np.str_ else 1, object if dtype is np.str_ else dtype)


@settings(deadline=None, max_examples=80)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (1,), (3,), (7,), (8,), (2, 4), (6, 6, 3), (6, 6, 1)]),
    feature=st.sampled_from([IMAGE, WRIST, STATE, ACTION, TEXT]),
)
def test_a_feature_of_any_dtype_and_shape_is_read_exactly_or_refused(
    dtype: Any, shape: tuple[int, ...], feature: str, folders: Folders
) -> None:
    steps = sets.episodes((2, 2))
    value = filled(shape, dtype)
    for step in itertools.chain(*steps):
        step[feature] = value
    folder = sets.write(folders(), steps, changed={feature: tensor(shape, dtype)})
    text = dtype is np.str_
    if feature == STATE:  # All its entries are taken, however many.
        fits = len(shape) <= 1 and not text
    elif feature == ACTION:
        fits = shape in ((7,), (8,)) and not text
    elif feature == TEXT:  # The code 1 is no character.
        fits = text and shape in ((), (1,))
    else:  # The text "1" is no picture, which is seen when it is decoded.
        fits = shape == (6, 6, 3) and dtype == np.uint8
    if not fits:
        part = "(translation|rotation|gripper) " if feature == ACTION else ""
        refused(folder, rf"(episode 0 of 'train': step 0: )?({part}.*)?{feature}")
        return
    batch = read(folder)
    if feature == TEXT:
        assert batch["instruction"] == ["1"] * 4
    elif feature == ACTION:
        np.testing.assert_array_equal(batch["actions"][:, 0], [[1.0] * 6 + [0.0]] * 4)
    else:
        found = batch[feature.removeprefix("observation/")]
        np.testing.assert_array_equal(found, np.ones((4, *(shape or (1,)))))


@pytest.mark.parametrize(
    ("feature", "described", "value", "rest"),
    [
        (IMAGE, f.Tensor(shape=(6, 6, 3), dtype=np.float32), np.ones((6, 6, 3), np.float32) / 2,
         r"observation/image: expected a picture \[H, W, 3\] of uint8.*found float32 \[6, 6, 3\]"),
        (IMAGE, f.Image(shape=(6, 6, 3), dtype=np.uint16), sets.file_of(DEEP),
         r"observation/image: expected a picture.*found uint16 \[6, 6, 3\]"),
        (IMAGE, f.Image(shape=(6, 6, 1)), sets.file_of(sets.picture(0)[..., 0]),
         r"observation/image: expected a picture.*found uint8 \[6, 6, 1\]"),
        (IMAGE, f.Image(shape=(6, 6, 4)), PNG,
         r"observation/image: expected a picture.*found uint8 \[6, 6, 4\]"),
        (IMAGE, f.Sequence(f.Image(shape=(6, 6, 3))), [PNG, PNG],
         r"observation/image: expected a picture.*found uint8 \[any, 6, 6, 3\]"),
        (WRIST, f.Sequence(f.Text()), ["a"],
         r"observation/wrist_image: expected a picture.*found text \[any\]"),
        (TEXT, f.Sequence(f.Text()), ["open", "pull", ""],
         r"language_instruction: expected an instruction, one text.*found text \[any\]"),
        (TEXT, f.Tensor(shape=(3,), dtype=np.str_), ["open", "pull", ""],
         r"language_instruction: expected an instruction, one text.*found text \[3\]"),
        (TEXT, f.Tensor(shape=(512,), dtype=np.float32), np.zeros(512, np.float32),
         r"language_instruction: expected an instruction, one text.*found float32 \[512\]"),
        (TEXT, f.ClassLabel(num_classes=3), 2,
         r"language_instruction: expected an instruction, one text.*found int64 \[\]"),
        (TEXT, f.Sequence(np.int32), [3, 9, 1],
         r"language_instruction: expected an instruction, one text.*found int32 \[any\]"),
        (TEXT, f.Image(shape=(6, 6, 3)), PNG,
         r"language_instruction: expected an instruction, one text.*found uint8 \[6, 6, 3\]"),
        (STATE, f.Tensor(shape=(8,), dtype=np.str_), ["0.5"] * 8,
         r"observation/state: expected numbers, found text \[8\]"),
        (STATE, f.Sequence(np.float32), [0.5] * 8,
         r"observation/state: expected a vector, found shape \[None\]"),
        (STATE, f.Sequence({"joints": np.float32}), {"joints": [0.5] * 8},
         r"steps lack observation/state, .* they have .*observation/state/joints"),
        ("observation/joint_state", f.Text(), "0 0 0 0 0 0 0",
         r"observation/joint_state: expected numbers, found text \[\]"),
    ],
)  # fmt: skip
def test_what_the_description_shows_is_refused_when_the_set_is_opened(
    folders: Folders, feature: str, described: Any, value: Any, rest: str
) -> None:
    steps = [[{**step, feature: value} for step in episode] for episode in sets.episodes((2,))]
    folder = sets.write(folders(), steps, changed={feature: described})
    with pytest.raises(DatasetError, match=f"^{re.escape(str(folder))}: {rest}"):
        data.RldsDataset(folder)
    refused(folder, rest)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            f.FeaturesDict({"steps": f.Sequence({"a": np.float32})}),
            "'steps' is no Dataset of steps",
        ),
        (
            f.FeaturesDict({"steps": f.Tensor(shape=(3,), dtype=np.float32)}),
            "'steps' is no Dataset",
        ),
        (f.FeaturesDict({"episodes": f.Dataset({"a": np.float32})}), r"no 'steps' .* \(episodes\)"),
        (f.FeaturesDict({"steps": f.Dataset(f.Image())}), "steps lack .*language_instruction"),
        (f.Dataset({"steps": np.float32}), "no 'steps' "),
    ],
)
def test_what_is_no_set_of_episodes_is_one_error(
    folders: Folders, features: Any, message: str
) -> None:
    folder = sets.write(folders())
    features.save_config(epath.Path(folder))
    with pytest.raises(DatasetError, match=message):
        data.RldsDataset(folder)


# Where else episodes are read.


@pytest.fixture
def bad_state(folders: Folders) -> Path:
    steps = sets.episodes()
    steps[1][2][STATE][3] = np.nan
    return sets.write(folders(), steps)


WHERE = "episode 1 of 'train': step 2: observation/state: entry 3 is nan"


def test_every_reader_gives_the_same_error(bad_state: Path, folders: Folders) -> None:
    dataset = data.RldsDataset(bad_state)
    good = sets.write(folders())
    for reader in (
        lambda: list(dataset.episodes()),
        lambda: list(dataset.frames(4, seed=0)),
        lambda: dataset.lengths,
        lambda: data.dataset_statistics(bad_state),
        lambda: data.calibration_set({str(good): 1.0, str(bad_state): 1.0}, frames=4),
    ):
        with pytest.raises(DatasetError, match=f"^{re.escape(f'{bad_state}: {WHERE}')}"):
            reader()
    assert not list(bad_state.glob("dataset_statistics*"))


def test_pictures_are_decoded_only_where_frames_are_drawn(folders: Folders) -> None:
    steps = sets.episodes((3, 3))
    steps[1][2][WRIST] = b""
    folder = sets.write(folders(), steps)
    where = "episode 1 of 'train': step 2: observation/wrist_image: the picture is missing"
    # A stride of 3 draws the first step of each.
    assert len(data.calibration_set(folder, trajectories=2, stride=3)) == 2
    with pytest.raises(DatasetError, match=where):
        data.calibration_set(folder, trajectories=2, stride=2)
    assert len(list(data.RldsDataset(folder).episodes(images=False))) == 2
    with pytest.raises(DatasetError, match=where):
        list(data.RldsDataset(folder).episodes())


@pytest.mark.parametrize("feature", [STATE, IMAGE])
def test_calibrate_writes_nothing_and_ends_with_code_2(
    folders: Folders, feature: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = sets.episodes()
    steps[1][2][feature] = np.full(8, np.inf, np.float32) if feature == STATE else b"no picture"
    folder, out = sets.write(folders(), steps), tmp_path / "run"
    command = ["calibrate", "--dataset", str(folder), "--frames", "7", "--out", str(out)]
    assert main(command) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"episode 1 of 'train': step 2: {feature}:" in printed
    assert "Traceback" not in printed
    assert not list(out.glob("*"))


def test_64_bit_jax_changes_no_byte(tmp_path: Path) -> None:
    found = {}
    before = jax.config.jax_enable_x64
    try:
        for wide in (False, True):
            jax.config.update("jax_enable_x64", wide)
            drawn = data.calibration_set("bundled", frames=5)
            drawn.save(tmp_path / "calibration.json")
            (batch,) = data.CalibrationSet.from_manifest(tmp_path / "calibration.json").batches(5)
            statistics = data.dataset_statistics(data.bundled_path(), "heldout", cache=False)
            statistics.save(tmp_path / "statistics.json")
            found[wide] = (
                (tmp_path / "calibration.json").read_bytes(),
                (tmp_path / "statistics.json").read_bytes(),
                {k: (v.dtype, v.tobytes()) for k, v in batch.items() if k != "instruction"},
            )
    finally:
        jax.config.update("jax_enable_x64", before)
    assert found[False] == found[True]
    dtypes = {name: dtype for name, (dtype, _) in found[True][2].items()}
    assert {name: str(dtype) for name, dtype in dtypes.items()} == {
        "image": "uint8", "wrist_image": "uint8", "state": "float32", "actions": "float32",
        "episode": "int64", "step": "int64", "seed": "int64",
    }  # fmt: skip


def test_a_calibration_set_is_written_where_nothing_is_wrong(
    folders: Folders, tmp_path: Path
) -> None:
    folder = sets.write(folders())
    assert (
        main(["calibrate", "--dataset", str(folder), "--frames", "5", "--out", str(tmp_path)]) == 0
    )
    assert pipeline.load_calibration(tmp_path).frames == 5
