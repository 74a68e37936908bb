"""Sums along trajectories against the costs of their frames, one by one."""

import dataclasses

import numpy as np
import pytest

from qvla_jax.errors import InputError
from qvla_jax.sensitivity import sensitivities
from qvla_jax.sensitivity.trajectories import trajectory_costs

from .toys import ToyFrames

EPISODES = [7, 3, 7, 7, 3]


@pytest.fixture(scope="module")
def table(policy, frames):
    return sensitivities(policy, frames, bits=(4, 16, 0), probes="full", joint=False)


def single_frame(number: int) -> ToyFrames:
    frame = ToyFrames(5)
    frame.frames = 1
    frame.arrays = {key: value[number : number + 1] for key, value in frame.arrays.items()}
    return frame


def test_a_trajectory_costs_what_its_frames_cost(policy, table):
    frames = ToyFrames(5)
    frames.manifest["episodes"] = EPISODES
    found = trajectory_costs(policy, frames, table, probes="full", batch=2)
    settings = {"bits": table.bits, "probes": "full", "joint": False}
    singles = [
        sensitivities(policy, single_frame(i), statistics=table.statistics, **settings).costs
        for i in range(5)
    ]
    expected = np.zeros((2, *table.costs.shape))
    for episode, costs in zip(EPISODES, singles, strict=True):
        expected[sorted({*EPISODES}).index(episode)] += costs
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-10)
    assert not found[:, :, 1].any()


def test_frames_without_trajectories_are_refused(policy, frames, table):
    with pytest.raises(InputError, match="trajectory of each"):
        trajectory_costs(policy, frames, table)


def test_a_table_of_other_layers_is_refused(policy, table):
    frames = ToyFrames(5)
    frames.manifest["episodes"] = EPISODES
    index = dataclasses.replace(table.index, layers=table.index.layers[:-1])
    count = len(index)
    other = dataclasses.replace(
        table, index=index, reads=None, costs=table.costs[:count], sizes=table.sizes[:count],
        standard_error=None,
    )  # fmt: skip
    with pytest.raises(InputError, match="other layers"):
        trajectory_costs(policy, frames, other)
