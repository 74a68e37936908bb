import pytest

from qvla_jax.inference import random_policy


@pytest.fixture(scope="session")
def policy():
    return random_policy("tiny-test")
