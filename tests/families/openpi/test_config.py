"""Presets and configurations of openpi."""

import dataclasses
import json

import pytest

from qvla_jax.errors import InputError
from qvla_jax.families.openpi.config import PRESETS, OpenpiConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    config = preset(name)
    assert config.name == name
    assert OpenpiConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_say_what_openpis_training_configurations_say():
    """Read off openpi/training/config.py: horizon, prompt, normalization, robot, deltas."""
    expected = {
        "pi0_libero": (50, 48, False, "zscore", "libero", True),
        "pi05_libero": (10, 200, False, "quantile", "libero", False),
        "pi0_droid": (10, 48, False, "zscore", "droid", False),
        "pi05_droid": (15, 200, True, "quantile", "droid", False),
        "pi0_aloha_sim": (50, 48, False, "zscore", "aloha", False),
        "pi05_aloha": (50, 200, True, "quantile", "aloha", True),
    }
    for name, values in expected.items():
        config = preset(name)
        assert values == (
            config.action_horizon,
            config.max_prompt_tokens,
            config.discrete_state,
            config.normalization,
            config.robot,
            config.delta_actions,
        )


def test_what_only_clients_are_told_is_no_part_of_the_identity():
    """Read off openpi/training/config.py: `policy_metadata`."""
    told = {name for name, config in PRESETS.items() if config.reset_pose is not None}
    assert told == {"pi0_aloha", "pi05_aloha", "pi0_aloha_towel", "pi0_aloha_tupperware"}
    config = preset("pi0_aloha")
    assert config.reset_pose == (0.0, -1.5, 1.5, 0.0, 0.0, 0.0)
    other = dataclasses.replace(config, reset_pose=None, executed_steps=4)
    assert other.identity() == config.identity()


def test_presets_execute_what_openpis_clients_do():
    """Read off main.py of openpi's examples libero, droid, aloha_real and aloha_sim."""
    steps = {"libero": {5}, "droid": {8}, "aloha": {10, 25}}
    for name, config in PRESETS.items():
        if config.robot is None or "polaris" in name:  # whose clients openpi does not hold
            assert config.executed_steps is None
        else:
            assert config.executed_steps in steps[config.robot]
    assert preset("pi0_aloha_sim").executed_steps == 10


def test_an_unknown_preset_lists_close_matches():
    with pytest.raises(InputError, match="did you mean pi05_libero"):
        preset("pi05_librero")
    with pytest.raises(InputError, match="'pi0_fast_libero': policies that decode action tokens"):
        preset("pi0_fast_libero")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"executed_steps": 0}, "executed_steps is 0"),
        ({"head_dim": 8}, "language.head_dim is 256 and action_expert.head_dim is 8"),
        ({"width": 7}, "action_expert.width is 7"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    config = preset("pi05_libero")
    if not change.keys() & {"num_steps", "executed_steps"}:
        change = {"action_expert": dataclasses.replace(config.action_expert, **change)}
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **change)
