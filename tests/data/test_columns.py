"""Numbers of states and actions: dtypes that are read exactly, and values that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvla_jax import data
from qvla_jax.data.open_x.columns import Entries
from qvla_jax.errors import DatasetError

from . import small_sets as sets
from .small_sets import ACTION, STATE

f = tfds.features


@given(
    values=hnp.arrays(
        st.sampled_from(["f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "bool"]), (3, 2)
    )
)
def test_values_are_read_exactly_or_refused_with_their_place(values: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = values.astype(np.float32)
    # Half of the range, so that differences stay finite; integers only where all are exact.
    whole = values.dtype.kind in "iu"
    limit = 2.0**24 if whole else float(np.finfo(np.float32).max) / 2
    bad = ~(np.abs(values.astype(np.float64)) <= limit)
    if bad.any():
        step, entry = np.argwhere(bad)[0]
        with pytest.raises(DatasetError, match=rf"^step {step + 5}: a: entry {entry} is "):
            Entries("a").of(list(values), 5)
    else:
        found = Entries("a").of(list(values))
        np.testing.assert_array_equal(found, values.astype(np.float64))
        np.testing.assert_array_equal(found.astype(np.float32), narrow)
        if whole:
            np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.int64))


@pytest.mark.parametrize("values", [[b"0.5", b"1"], ["1", "2"], [[1.0], [1.0, 2.0]], [1j, 2j]])
def test_what_is_no_number_is_refused(values: list[Any]) -> None:
    with pytest.raises(DatasetError, match=r"^a: (expected a vector of numbers|steps differ)"):
        Entries("a").of(values)


@pytest.mark.parametrize(
    ("described", "value", "message"),
    [
        (f.Tensor(shape=(8,), dtype=np.float64, encoding="zlib"), 1e39, "entry 2 is 1e.39, which "
         "is more than float32 can hold"),
        (f.Tensor(shape=(8,), dtype=np.int64), 2**24 + 1, "entry 2 is 16777217, which is more"),
        (f.Tensor(shape=(8,), dtype=np.float32), np.finfo(np.float32).min, "entry 2 is -3.4"),
    ],
)  # fmt: skip
def test_what_float32_cannot_hold_is_refused(
    tmp_path: Path, described: Any, value: float, message: str
) -> None:
    steps = sets.episodes()
    for step in (*steps[0], *steps[1]):
        step[STATE] = np.zeros(8, described.np_dtype)
    steps[1][1][STATE][2] = value
    folder = sets.write(tmp_path / "set", steps, changed={STATE: described})
    with pytest.raises(DatasetError, match=f"episode 1 of 'train': step 1: {STATE}: {message}"):
        data.calibration_set(folder, frames=2)


def spec(**action: Any) -> data.open_x.DatasetSpec:
    """LIBERO's, with the first step left out."""
    tree = data.open_x.get("libero").to_json()
    tree = {**tree, "skip_first": 1, "action": {**tree["action"], **action}}
    return data.open_x.DatasetSpec.from_json(tree, "here")


@pytest.mark.parametrize(
    "gripper", ["open", "closed", "open_signed", "closed_signed", "open_settled", "closing"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_gripper_encoding_hides_a_value(tmp_path: Path, gripper: str, value: float) -> None:
    """Signed ones clip, and a comparison with NaN is false."""
    steps = sets.episodes((4,))
    for step in steps[0]:
        step[ACTION][6] = 1
    steps[0][2][ACTION][6] = value
    folder = sets.write(tmp_path / "set", steps)
    with pytest.raises(DatasetError, match=f"step 2: {ACTION}: entry 6 is "):
        data.calibration_set(folder, frames=2, spec=spec(gripper_encoding=gripper))


def test_steps_that_the_specification_leaves_out_may_hold_anything(tmp_path: Path) -> None:
    steps = sets.episodes((4,))
    steps[0][0][ACTION][:] = np.nan
    steps[0][0][STATE][:] = np.inf
    steps[0][0][sets.IMAGE] = b""
    steps[0][0][sets.TEXT] = ""
    folder = sets.write(tmp_path / "set", steps)
    drawn = data.calibration_set(folder, trajectories="all", spec=spec())
    assert len(drawn) == 3
    # Places in errors are those in the record.
    steps[0][1][STATE][4] = np.nan
    steps[0][2][sets.IMAGE] = b""
    folder = sets.write(tmp_path / "other", steps)
    with pytest.raises(DatasetError, match=f"step 1: {STATE}: entry 4 is nan"):
        data.calibration_set(folder, trajectories="all", spec=spec())
    steps[0][1][STATE][4] = 0
    folder = sets.write(tmp_path / "third", steps)
    with pytest.raises(DatasetError, match=f"step 2: {sets.IMAGE}: the picture is missing"):
        data.calibration_set(folder, trajectories="all", spec=spec())


def test_the_last_pose_counts_where_actions_are_differences(tmp_path: Path) -> None:
    steps = sets.episodes((4,))
    for step in steps[0]:
        step[ACTION][6] = 1
    steps[0][3][ACTION][1] = np.inf
    folder = sets.write(tmp_path / "set", steps)
    reached = spec(movement="reached", rotation_encoding="euler")
    with pytest.raises(DatasetError, match=f"step 3: {ACTION}: entry 1 is inf"):
        data.calibration_set(folder, frames=1, spec=reached)


def test_rewards_that_are_no_single_number_are_left_alone(tmp_path: Path) -> None:
    """Nothing is computed from them."""
    forms = {
        "reward": (f.Tensor(shape=(2,), dtype=np.float32), np.ones(2, np.float32)),
        "discount": (f.Tensor(shape=(1,), dtype=np.float32), np.full(1, 0.5, np.float32)),
        "is_terminal": (f.Text(), "yes"),
    }
    steps = [
        [{**step, **{name: value for name, (_, value) in forms.items()}} for step in episode]
        for episode in sets.episodes((3,))
    ]
    changed = {name: described for name, (described, _) in forms.items()}
    (episode,) = data.RldsDataset(sets.write(tmp_path / "set", steps, changed=changed)).episodes()
    assert episode.reward.tolist() == [0, 0, 0]
    assert episode.discount.tolist() == [0.5] * 3
    assert episode.is_terminal.tolist() == [False] * 3
