"""Statistics against float64 formulas, and their cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvla_jax import data
from qvla_jax.caches import cache_folder
from qvla_jax.data import statistics as statistics_module
from qvla_jax.data.statistics import ArrayStatistics, joint_statistics
from qvla_jax.errors import DatasetError, InputError

from . import small_sets


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = tmp_path / "copy"
    shutil.copytree(data.bundled_path(), target)
    return target


def cache_of(folder: Path) -> Path:
    return folder / "dataset_statistics_heldout_libero.json"


def test_they_are_numpys_in_float64() -> None:
    dataset = data.RldsDataset(data.bundled_path(), "heldout")
    episodes = list(dataset.episodes(images=False))
    statistics = data.dataset_statistics(data.bundled_path(), "heldout", cache=False)
    actions = np.concatenate([e.action for e in episodes]).astype(np.float64)
    states = np.concatenate([e.state for e in episodes if e.state is not None]).astype(np.float64)
    assert statistics.num_trajectories == 10
    assert statistics.num_transitions == len(actions)
    assert statistics.proprio is not None
    for found, values in ((statistics.action, actions), (statistics.proprio, states)):
        np.testing.assert_allclose(found.mean, values.sum(0) / len(values), rtol=1e-12)
        variance = ((values - values.mean(0)) ** 2).sum(0) / len(values)
        np.testing.assert_allclose(found.std, np.sqrt(variance), rtol=1e-12)
        np.testing.assert_array_equal(found.min, values.min(0))
        np.testing.assert_array_equal(found.max, values.max(0))
        np.testing.assert_array_equal(found.q01, np.quantile(values, 0.01, axis=0))
        np.testing.assert_array_equal(found.q99, np.quantile(values, 0.99, axis=0))
    assert statistics.action.mask is not None
    assert statistics.action.mask.tolist() == [True] * 6 + [False]
    assert statistics.proprio.mask is None


def test_json_has_the_public_layout() -> None:
    tree = data.dataset_statistics(data.bundled_path(), "heldout", cache=False).to_json()
    assert list(tree) == ["libero_spatial"]
    entry = tree["libero_spatial"]
    assert set(entry) == {"action", "proprio", "num_transitions", "num_trajectories"}
    assert set(entry["action"]) == {"mean", "std", "max", "min", "q01", "q99", "mask"}
    assert set(entry["proprio"]) == {"mean", "std", "max", "min", "q01", "q99"}
    assert len(entry["action"]["q01"]) == 7
    assert len(entry["proprio"]["q01"]) == 8


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    statistics = data.dataset_statistics(data.bundled_path(), "heldout", cache=False)
    statistics.save(tmp_path / "dataset_statistics.json")
    loaded = data.DatasetStatistics.load(tmp_path / "dataset_statistics.json")
    assert loaded.to_json() == statistics.to_json()


def test_those_of_several_sets_are_of_all_their_steps(tmp_path: Path) -> None:
    paths = [
        small_sets.write(tmp_path / name, small_sets.episodes(lengths))
        for name, lengths in (("one", (3, 4)), ("two", (40,)))
    ]
    found = joint_statistics(paths)
    steps = [e.action for p in paths for e in data.RldsDataset(p, "train").episodes(images=False)]
    actions = np.concatenate(steps).astype(np.float64)
    assert (found.num_trajectories, found.num_transitions) == (3, 47)
    np.testing.assert_array_equal(found.action.q01, np.quantile(actions, 0.01, axis=0))
    np.testing.assert_array_equal(found.action.q99, np.quantile(actions, 0.99, axis=0))
    assert list(found.to_json()) == ["libero_spatial+libero_spatial"]
    (alone,) = joint_statistics(paths[:1]).to_json()
    assert alone == "libero_spatial"


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 5)),
        elements=st.floats(-1e3, 1e3, width=32),
    )
)
def test_they_are_ordered(values: np.ndarray) -> None:
    s = ArrayStatistics.of(values)
    slack = 1e-9 * (1 + np.abs(values).max())
    assert (s.min <= s.q01 + slack).all()
    assert (s.q01 <= s.q99 + slack).all()
    assert (s.q99 <= s.max + slack).all()
    assert (s.min - slack <= s.mean).all()
    assert (s.mean <= s.max + slack).all()
    assert (s.std >= 0).all()


def test_cache_is_written_beside_the_data_and_used(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data.dataset_statistics(copy, "heldout")
    assert cache_of(copy).is_file()

    def no_reading(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(statistics_module.DatasetStatistics, "of", no_reading)
    assert data.dataset_statistics(copy, "heldout").to_json() == first.to_json()
    # What is cached is an ordinary dataset_statistics.json.
    assert data.DatasetStatistics.load(cache_of(copy)).to_json() == first.to_json()


def test_stale_or_broken_cache_is_computed_again(copy: Path) -> None:
    first = data.dataset_statistics(copy, "heldout")
    stale = json.loads(cache_of(copy).read_text())
    stale["libero_spatial"]["fingerprint"] = "of other data"
    stale["libero_spatial"]["num_transitions"] = 1
    for content in (json.dumps(stale), "{", "[]", '{"libero_spatial": 3}'):
        cache_of(copy).write_text(content)
        assert data.dataset_statistics(copy, "heldout").to_json() == first.to_json()
        assert json.loads(cache_of(copy).read_text()) != stale


def test_changed_data_change_the_fingerprint(copy: Path) -> None:
    before = data.RldsDataset(copy, "heldout").fingerprint()
    path = next(copy.glob("*-heldout.array_record-*"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert data.RldsDataset(copy, "heldout").fingerprint() != before


def test_folder_that_cannot_be_written_caches_for_the_user(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not stop the superuser, whom containers run tests as.
    write = statistics_module.write_json

    def refuse(path: Path, tree: object) -> None:
        if path.parent == copy:
            raise InputError(f"{path}: cannot be written")
        write(path, tree)

    monkeypatch.setattr(statistics_module, "write_json", refuse)
    data.dataset_statistics(copy, "heldout")
    assert not cache_of(copy).exists()
    assert len(list(cache_folder("statistics").rglob("*.json"))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object"),
        ('{"a": {}}', "'a' has no 'action'"),
        ('{"a": {"action": {"mean": [0]}}}', "expected the lists"),
        ('{"a": {}, "b": {}}', "name one of its data sets: a, b"),
    ],
)
def test_bad_files_are_one_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "dataset_statistics.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=message):
        data.DatasetStatistics.load(path)


def test_non_finite_data_are_refused() -> None:
    dataset = data.RldsDataset(data.bundled_path(), "heldout")
    (episode,) = dataset.episodes([0], images=False)
    episode.action[3, 2] = np.nan
    with pytest.raises(DatasetError, match="action of episode 0 holds non-finite values"):
        data.DatasetStatistics.of("set", [episode])
    with pytest.raises(DatasetError, match="no episodes"):
        data.DatasetStatistics.of("set", [])
