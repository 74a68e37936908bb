"""Streamed sweeps against sweeps with all weights on the device."""

import dataclasses

import numpy as np
import pytest

from qvla_jax import load_policy
from qvla_jax.data import calibration_set
from qvla_jax.errors import InputError
from qvla_jax.families.prismatic.config import PRESETS
from qvla_jax.inference import random_policy
from qvla_jax.mapping import region_of
from qvla_jax.quantization import QuantizerSettings
from qvla_jax.quantization.layers import LayerRules
from qvla_jax.sensitivity import SweepStore, input_statistics, sensitivities
from qvla_jax.sensitivity.statistics import streamed_means

NEAREST = QuantizerSettings(rounding="nearest")


@pytest.fixture(scope="module")
def calibration():
    return calibration_set("bundled", frames=3, seed=0)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A public directory of random weights, some of which no action reads.

    As at full size: last blocks behind the features, and an attention pool outside of blocks.
    """
    small = PRESETS["tiny-test"]
    first, second = (
        dataclasses.replace(tower, depth=2, feature_block=0, final_norm=True)
        for tower in small.vision
    )
    second = dataclasses.replace(second, attention_pool=True)
    config = dataclasses.replace(small, name="unread-test", vision=(first, second))
    folder = tmp_path_factory.mktemp("public") / "policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, config.name, config)
        random_policy(config.name).export(folder)
    return folder


@pytest.fixture(scope="module")
def whole(public, calibration):
    return sensitivities(
        load_policy(public), calibration, quantizer=NEAREST, joint=False, probes=2, seed=1
    )


def test_mapped_weights_visited_a_stage_at_a_time_give_the_same_table(
    public, whole, calibration, tmp_path
):
    policy = load_policy(public, mapped=True)
    kernel = policy.model.language_model.model.layers[0].mlp.up_proj.kernel[...]
    assert region_of(kernel) is not None
    store = SweepStore(tmp_path)
    arguments = dict(
        quantizer=NEAREST, joint=False, probes=2, seed=1, streamed=True, batch=2, store=store
    )
    streamed = sensitivities(policy, calibration, **arguments)
    assert streamed.index == whole.index
    for path, mean in whole.statistics.means.items():
        np.testing.assert_allclose(streamed.statistics.means[path], mean, rtol=1e-4, atol=1e-5)
    again = sensitivities(
        policy, calibration, **{**arguments, "statistics": whole.statistics, "store": None}
    )
    np.testing.assert_allclose(again.costs, whole.costs, rtol=1e-4, atol=1e-9 * whole.costs.max())
    unread = [
        number
        for number, path in enumerate(streamed.index.paths)
        if "attn_pool" in path or "featurizer.blocks.1" in path
    ]
    assert len(unread) > 6
    nothing = np.isin(streamed.index.layer_of, unread)
    assert not streamed.costs[nothing].any()
    assert streamed.costs[~nothing].any(axis=1).all()
    assert len(list(tmp_path.glob("*/batch*.npy"))) == 2
    resumed = sensitivities(policy, calibration, **arguments)
    np.testing.assert_array_equal(resumed.costs, streamed.costs)


def test_means_are_those_of_the_pass_that_measures_covariances(policy, frames, index):
    expected = input_statistics(policy, frames, index, seed=3)
    found = streamed_means(policy, frames, index, seed=3, batch=2)
    for path, mean in expected.means.items():
        np.testing.assert_allclose(found.means[path], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "exact"}, "streamed sweeps know jacobian and taylor"),
        ({"joint": True}, "joint=False"),
        ({"quantizer": QuantizerSettings()}, 'rounding="nearest"'),
        (
            {"rules": LayerRules(include=(r"language_model\.", r"action_head\."))},
            "exclude it",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(calibration, arguments, message):
    settings = {"quantizer": NEAREST, "joint": False, "streamed": True, **arguments}
    with pytest.raises(InputError, match=message):
        sensitivities(random_policy("tiny-test"), calibration, **settings)


def test_only_public_directories_are_mapped():
    with pytest.raises(InputError, match="public directory"):
        load_policy("libero-mini", mapped=True)
