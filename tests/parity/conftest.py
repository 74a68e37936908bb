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


@pytest.fixture(scope="session")
def openpi_references(tmp_path_factory):
    """Name -> recorded pi0 or pi0.5, unpacked on first use."""
    made = {}

    def get(name):
        if name not in made:
            from .openpi import open_openpi

            made[name] = open_openpi(name, tmp_path_factory.mktemp("openpi"))
        return made[name]

    return get


@pytest.fixture(scope="session")
def openpi_runs(openpi_references):
    """Name -> (reference, one pass of our network over both samples)."""
    made = {}

    def get(name):
        if name not in made:
            from .openpi import stages

            reference = openpi_references(name)
            run = stages(reference.policy.model, reference.inputs, reference)
            made[name] = reference, run
        return made[name]

    return get
