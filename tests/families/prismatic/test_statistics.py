"""Numbers that are not finite: in parts that are used, and in parts that are not."""

import functools
import json
import math

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax.checkpoints.tensor_files import TensorFile
from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.export import reexport
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.normalization import Normalizer
from qvla_jax.inference import import_policy, load_policy, random_policy
from qvla_jax.inference.policy import make_policy
from qvla_jax.inference.saving import save_settings
from qvla_jax.pipeline.configs import PackConfig
from qvla_jax.pipeline.pack import pack
from qvla_jax.plain import finite

from .test_huggingface import architecture, write_directory
from .test_options import _entry


def _strict(text: str):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@functools.cache
def _policy():  # no fixture: hypothesis shows all arguments
    return random_policy("tiny-test")


bad = st.sampled_from([math.nan, math.inf, -math.inf])
places = st.tuples(
    st.sampled_from(["libero_spatial", "other"]),
    st.sampled_from(["action", "proprio"]),
    st.sampled_from(["q01", "q99", "min", "max", "mean", "std"]),
    st.integers(0, 6),
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(places, bad), min_size=1, max_size=3),
    st.sampled_from(["quantiles", "min_max"]),
)
def test_load_save_and_export_agree(tmp_path_factory, faults, kind):
    policy = _policy()
    statistics = {"libero_spatial": _entry(7, 8), "other": _entry(7, 8)}
    statistics["libero_spatial"]["action"]["mask"][6] = False
    used = {"quantiles": ("q01", "q99"), "min_max": ("min", "max")}[kind]
    is_refused = False
    for (data_set, block, key, place), value in faults:
        statistics[data_set][block][key][place] = value
        read = data_set == "libero_spatial" and key in used
        is_refused |= read and (block, place) != ("action", 6)
    config = policy.config.__class__.from_dict(
        policy.config.to_dict() | {"action_normalization": kind}
    )

    def made(entries):
        files = policy.processor.files()
        return make_policy(config, policy.model, files, entries, source="statistics.json")

    if is_refused:
        with pytest.raises(
            CheckpointError, match=r"statistics\.json: libero_spatial\..*NaN or inf"
        ):
            made(statistics)
        return
    first = made(statistics)
    folder = tmp_path_factory.mktemp("saved")
    save_settings(first.config, first.processor, first.statistics, folder)
    again = made(_strict((folder / "dataset_statistics.json").read_text()))
    assert again.statistics == first.statistics
    assert again.fingerprint == first.fingerprint
    values = np.linspace(-2, 2, 7)
    np.testing.assert_array_equal(again.normalize_actions(values), first.normalize_actions(values))
    assert np.isfinite(first.unnormalize_actions(values)).all()


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists))
def test_only_numbers_that_are_not_finite_change(value):
    cleaned = finite(value)
    json.dumps(cleaned, allow_nan=False)
    if "NaN" not in json.dumps(value) and "Infinity" not in json.dumps(value):
        assert cleaned == value


def test_every_way_out_takes_what_loads(tmp_path):
    config = architecture("tokens")
    folder = tmp_path / "hf"
    write_directory(folder, config, make_model(config, rngs=nnx.Rngs(0)))
    path = folder / "dataset_statistics.json"
    statistics = {"libero_x": _entry(7, 8)}
    statistics["libero_x"]["action"]["std"][0] = math.nan
    statistics["libero_x"]["action"]["max"][1] = math.inf
    path.write_text(json.dumps(statistics))
    policy = load_policy(folder)
    assert policy.statistics["libero_x"]["action"]["std"][0] is None
    policy.save(tmp_path / "saved")
    policy.export(tmp_path / "exported")
    import_policy(folder, tmp_path / "imported", dtype=np.float32)
    reexport(folder, tmp_path / "copied")
    pack(PackConfig(model=str(folder), file=tmp_path / "p.qvla"))
    for name in ("saved", "exported", "imported", "copied"):
        text = (tmp_path / name / "dataset_statistics.json").read_text()
        assert _strict(text) == policy.statistics
        _strict((tmp_path / name / "config.json").read_text())
        if name != "copied":  # whose name is that of its folder
            assert load_policy(tmp_path / name).fingerprint == policy.fingerprint
    header = _strict(TensorFile(tmp_path / "p.qvla").metadata["header"])
    assert header["statistics"] == load_policy(tmp_path / "p.qvla").statistics == policy.statistics
    statistics["libero_x"]["action"]["q01"][2] = math.nan
    path.write_text(json.dumps(statistics))
    message = r"dataset_statistics\.json: libero_x\.action: 'q01' holds NaN or inf at place 2"
    for read in (load_policy, lambda folder: import_policy(folder, tmp_path / "new")):
        with pytest.raises(CheckpointError, match=message):
            read(folder)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q01": None}, r"x.q01: expected a list of numbers, found None"),
        ({"q01": "0" * 7}, r"x.q01: expected a list of numbers"),
        ({"q99": ["1"] * 7}, r"x.q99\[0\]: expected a number, found '1'"),
        ({"q99": [True] * 7}, r"x.q99\[0\]: expected a number, found True"),
        ({"q99": [[1.0]] * 7}, r"x.q99\[0\]: expected a number, found \[1.0\]"),
        ({"q99": [10**400] * 7}, r"x.q99: int too large"),
        ({"mask": [1] * 7}, r"x.mask: expected a list of true and false"),
        ({"mask": [True] * 6}, r"x: q01, q99 and mask have shapes \(7,\), \(7,\), \(6,\)"),
    ],
)
def test_bounds_are_lists_of_numbers(change, message):
    with pytest.raises(CheckpointError, match=message):
        Normalizer.from_statistics(_entry(7, 8)["action"] | change, where="x")


def test_bounds_that_are_missing_are_named():
    block = {key: value for key, value in _entry(7, 8)["action"].items() if key != "max"}
    with pytest.raises(CheckpointError, match="x: 'max' is missing"):
        Normalizer.from_statistics(block, where="x", kind="min_max")
