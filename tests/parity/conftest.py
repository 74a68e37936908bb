"""Fixtures: each reference checkpoint is unpacked and loaded once."""

import pytest

from .reference import open_reference


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Name -> (reference, policy, stages of sample 0), made on first use."""
    made = {}

    def get(name):
        if name not in made:
            from .reference import stages

            reference = open_reference(name, tmp_path_factory.mktemp("reference") / name)
            policy = reference.load()
            made[name] = reference, policy, stages(policy.model, reference.inputs(policy))
        return made[name]

    return get
