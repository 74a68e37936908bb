"""A tiny policy and its input moments, shared by the tests."""

import pytest

import qvla_jax
from qvla_jax.inference import random_policy


@pytest.fixture(scope="session")
def policy():
    return random_policy("tiny-test", seed=0)


@pytest.fixture(scope="session")
def calibration():
    return qvla_jax.calibration_set("bundled", frames=5, seed=0)
