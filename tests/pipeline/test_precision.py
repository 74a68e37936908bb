"""JAX_ENABLE_X64 changes no stored byte: stages repeat those of the shared run beside it."""

import dataclasses
import doctest
import shutil

import jax
import numpy as np
import pytest

from qvla_jax import pipeline, precision
from qvla_jax.inference import load_policy
from qvla_jax.pipeline import files


@pytest.fixture
def wide(config, content, tmp_path, monkeypatch):
    """The settings of the shared run, to repeat its stages with 64-bit types in another folder."""
    del content
    out = tmp_path / "out"
    out.mkdir()
    shutil.copyfile(config.out / files.CALIBRATION, out / files.CALIBRATION)
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)  # allocations hold their seconds
    with jax.enable_x64(True):
        yield dataclasses.replace(config, out=out, thorough=False, validate=0)


def test_a_walk_stores_the_same_bytes(wide, config):
    pipeline.sensitivity(wide)
    pipeline.allocate(wide)
    packed = pipeline.quantize(wide)
    names = [files.STATISTICS, files.POLICY, "sensitivity_input_hessian.safetensors"]
    for name in (files.SENSITIVITY, *names):
        assert (wide.out / name).read_bytes() == (config.out / name).read_bytes(), name
    bits = [pipeline.Allocations.load(c.out / files.ALLOCATION).chosen.bits for c in (wide, config)]
    np.testing.assert_array_equal(*bits)
    observation = packed.fake_observation()
    found = packed.infer(observation)
    with jax.enable_x64(False):
        expected = load_policy(config.out / files.POLICY).infer(observation)
    np.testing.assert_array_equal(found, expected)


def test_policies_are_stored_and_packed_to_the_same_bytes(wide, config, tmp_path):
    for name, enabled in (("wide", True), ("plain", False)):
        with jax.enable_x64(enabled):
            policy, folder = load_policy(config.model), tmp_path / name
            policy.save(folder / "saved")
            policy.export(folder / "exported")
            settings = {"model": config.model, "mean_bits": 9.0}
            pipeline.pack(pipeline.PackConfig(file=folder / "pack.qvla", **settings))
    stored = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("wide", "plain")
    }
    assert stored["wide"] == stored["plain"]
    assert len(stored["wide"]) > 8


def test_the_example_holds():
    assert doctest.testmod(precision).failed == 0
