"""Instructions: as text or as codes, one for each step; episodes without any."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax import data
from qvla_jax.data.open_x.instructions import instruction_text
from qvla_jax.errors import DatasetError
from qvla_jax.families.prismatic.network import ModelInputs
from qvla_jax.training.frames import load_frames

from . import small_sets as sets
from .small_sets import TEXT

f = tfds.features


def written(folder: Path, texts: list[list[Any]], described: Any = None) -> Path:
    steps = sets.episodes([len(each) for each in texts])
    for episode, each in zip(steps, texts, strict=True):
        for step, text in zip(episode, each, strict=True):
            step[TEXT] = text
    return sets.write(folder, steps, changed={TEXT: described} if described else None)


def codes(text: str, size: int = 40, dtype: Any = np.uint8) -> np.ndarray:
    encoded = np.frombuffer(text.encode(), np.uint8)
    return np.pad(encoded, (0, size - len(encoded))).astype(dtype)


WORDS = st.text(
    st.characters(exclude_categories=("C",), exclude_characters="["), min_size=1
).filter(lambda text: bool(text.strip()) and "b'" not in text and 'b"' not in text)


@given(text=WORDS, dtype=st.sampled_from(["u1", "i4", "i8"]))
def test_text_and_its_codes_are_the_text(text: str, dtype: str) -> None:
    assert instruction_text(text) == instruction_text(text.encode()) == text
    assert instruction_text(codes(text, len(text.encode()) + 3, dtype)) == text
    assert instruction_text(np.asarray([text.encode()], object)) == text


@given(value=st.binary(min_size=1) | st.lists(st.integers(-3, 300), min_size=1))
def test_a_prompt_is_never_what_python_prints(value: bytes | list[int]) -> None:
    stored = value if isinstance(value, bytes) else np.asarray(value)
    try:
        text = instruction_text(stored)
    except DatasetError:
        return
    found = text.encode()
    assert found == (value if isinstance(value, bytes) else bytes(value).rstrip(b"\0"))
    assert not text.startswith(("b'", 'b"', "[b'"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_codes_of_characters_are_read_as_utf_8(tmp_path: Path, dtype: Any) -> None:
    text = "mets la tasse près du café"
    described = f.Tensor(shape=(40,), dtype=dtype)
    folder = written(tmp_path / "set", [[codes(text, dtype=dtype)] * 3], described)
    (batch,) = data.calibration_set(folder, frames=3).batches(3)
    assert batch["instruction"] == [text] * 3


@pytest.mark.parametrize(
    "value",
    [[0, 0, 1, 0], [101, 7592, 102, 0], [80, 0, 80, 0], [-1, 80, 80, 80], [80, 195, 80, 0]],
    ids=["one-hot", "tokens", "a zero inside", "negative", "not UTF-8"],
)
def test_numbers_that_are_no_codes_are_refused(tmp_path: Path, value: list[int]) -> None:
    described = f.Tensor(shape=(4,), dtype=np.int32)
    folder = written(tmp_path / "set", [[np.asarray(value, np.int32)] * 2], described)
    message = rf"{folder}: episode 0 of 'train': step 0: {TEXT}: "
    with pytest.raises(DatasetError, match=message):
        data.calibration_set(folder, frames=2)


def test_an_instruction_may_change_within_an_episode(tmp_path: Path) -> None:
    """Each frame has that of its step, as in the public training code."""
    texts = [["reach", "reach", "lift"], ["push"] * 2]
    folder = written(tmp_path / "set", texts)
    (batch,) = data.calibration_set(folder, trajectories="all").batches(9)
    places = zip(batch["episode"], batch["step"], strict=True)
    assert batch["instruction"] == [texts[episode][step] for episode, step in places]
    frames = data.RldsDataset(folder).frames()
    assert [frame.instruction for frame in frames] == [*texts[0], *texts[1]]


def test_episodes_without_an_instruction_are_passed_over_and_counted(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", [["lift"] * 3, [""] * 4, [" "] * 2])
    drawn = data.calibration_set(folder, trajectories="all")
    assert set(drawn.manifest["episodes"]) == {0}
    assert drawn.manifest["sources"][0]["unlabeled"] == 2
    with pytest.raises(DatasetError, match="4 frames asked for, 1 episodes have 3"):
        data.calibration_set(folder, frames=4)
    # Statistics are those of all episodes, as in the public training code.
    assert data.dataset_statistics(folder, cache=False).num_transitions == 9


def test_a_set_without_instructions_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", [[""] * 3, [""] * 4])
    message = (
        f"{folder}: split 'train' has no episode with an instruction: {TEXT} is empty in all 2"
    )
    with pytest.raises(DatasetError, match=message):
        data.calibration_set(folder, frames=2)
    with pytest.raises(DatasetError, match=r"set \(train\): no episode has an instruction"):
        load_frames([data.RldsDataset(folder)], Processor(), horizon=8, stage="load")


def test_training_reads_each_step_s_instruction(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", [[""] * 2, ["reach", "reach", "lift"]])
    processor = Processor()
    assert len(load_frames([data.RldsDataset(folder)], processor, horizon=8, stage="load")) == 3
    assert processor.seen == ["reach", "reach", "lift"]


class Processor:
    """Stands in for a policy's: notes the instructions that it is given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def to_robot(self, actions: Any) -> Any:
        return actions

    def normalize_actions(self, actions: Any, state: Any) -> Any:
        return actions

    def __call__(self, batch: dict[str, Any]) -> ModelInputs:
        self.seen += batch["instruction"]
        zeros = np.zeros((len(batch["instruction"]), 1), np.int32)
        return ModelInputs(images=batch["image"], input_ids=zeros, prompt_length=zeros[:, 0])
