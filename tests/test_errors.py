"""Messages about names that there are not."""

import doctest

import pytest

from qvla_jax import errors
from qvla_jax.errors import unknown

KNOWN = ("jacobian", "refined", "exact")


@pytest.mark.parametrize("name", ["jacobain", "jacobin", "Jacobian"])
def test_a_slip_of_the_finger_is_understood(name):
    assert unknown("method", name, KNOWN) == f"unknown method {name!r}; did you mean jacobian?"


def test_what_resembles_nothing_lists_everything():
    assert unknown("method", 3, KNOWN) == "unknown method 3; there are: jacobian, refined, exact."
    assert unknown("method", "x", ()) == "unknown method 'x'; there are: none."


def test_the_most_similar_come_first_and_are_few():
    names = [f"solver{n}" for n in range(9)] + ["solver:marginal"]
    said = unknown("solver", "solver:margin", names)
    assert said.startswith("unknown solver 'solver:margin'; did you mean solver:marginal or ")
    assert said.count(" or ") == 2


def test_the_examples_hold():
    assert doctest.testmod(errors).failed == 0
