"""Policies by name: the bits of `MODEL@RUN` and its other budgets are really applied."""

import numpy as np
import pytest

from qvla_jax.errors import InputError
from qvla_jax.inference import load_policy
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations
from qvla_jax.pipeline.policies import load_named_policy


@pytest.fixture(scope="module")
def observation(config):
    return load_policy(config.model).fake_observation()


def test_the_chosen_allocation_acts_as_its_packed_file(config, content, observation):
    del content
    named = load_named_policy(f"{config.model}@{config.out}")
    packed = load_policy(config.out / files.POLICY)
    np.testing.assert_allclose(named.infer(observation), packed.infer(observation), atol=1e-3)


def test_other_budgets_are_other_policies(config, content, observation):
    del content
    full = load_policy(config.model).infer(observation)
    errors = [
        np.abs(load_named_policy(f"{config.model}@{config.out}{tail}").infer(observation) - full)
        for tail in (":uniform8", "", ":12")
    ]
    sums = [error.sum() for error in errors]
    assert len(set(sums)) == 3
    assert Allocations.load(config.out / files.ALLOCATION).at("uniform8").matches == 8


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("missing", "neither a bit-width nor the folder of a run"),
        ("{out}:7", "no allocation at the budget '7', only at 10, 9, 12, uniform8"),
    ],
)
def test_wrong_names_are_refused(config, content, tail, message):
    del content
    with pytest.raises(InputError, match=message):
        load_named_policy(f"{config.model}@{tail.format(out=config.out)}")
