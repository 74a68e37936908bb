import pytest

from qvla_jax.inference import random_policy

from .openpi_policies import make_policies


@pytest.fixture(scope="session")
def policy():
    return random_policy("tiny-test")


@pytest.fixture(scope="module")
def policies():
    """Robot -> a policy of openpi."""
    return make_policies()
