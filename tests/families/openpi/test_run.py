"""pi0.5 walks the whole street: from calibration to a report and a file that loads again."""

import dataclasses
import json

import numpy as np
import pytest

from qvla_jax.cli import main
from qvla_jax.data import calibration_set
from qvla_jax.errors import InputError
from qvla_jax.inference import load_policy
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.pipeline.calibrate import check_frames, load_calibration


@pytest.fixture(scope="module")
def walked(published, tokenizer, tmp_path_factory):
    """The folder of a run, and the policy that it began with."""
    variant, out = "pi05", tmp_path_factory.mktemp("run")
    options = dict(preset="pi05_libero", tokenizer=str(tokenizer))
    given = {
        **options, "model": published[variant], "out": out, "frames": 3, "probes": 1,
        "budget-bits": 12, "solvers": "greedy:marginal", "eval-frames": 2, "latency-calls": 0,
    }  # fmt: skip
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    nothing_beside = ["--sweep", "--match-uniform", "--uniform-bits"]
    assert main(["run", *arguments, *nothing_beside]) == 0
    return out, load_policy(published[variant], **options)


def test_the_packed_file_acts_as_its_values_do(walked):
    out, policy = walked
    packed = load_policy(out / "policy.qvla")
    assert packed.config == policy.config
    observation = policy.fake_observation()
    found = packed.infer(observation, seed=3)
    assert np.abs(found - policy.infer(observation, seed=3)).max() > 1e-5
    same = unpacked(policy, packed).infer(observation, seed=3)
    np.testing.assert_allclose(found, same, rtol=1e-3, atol=1e-3)  # of a network of high gain
    assert json.loads((out / "report.json").read_text())["heldout"]["frames"] == 2


def test_costs_are_of_the_entries_that_the_robot_executes(walked):
    out, policy = walked
    (result,) = [
        entry
        for entry in json.loads((out / "evaluation.json").read_text())["methods"]
        if entry["family"] == "ours"
    ]
    assert len(result["versus_full_precision"]["mse_by_dimension"]) == 7 < policy.config.action_dim


def test_the_manifest_tells_the_noise(walked):
    out, policy = walked
    drawn = load_calibration(out)
    assert drawn.manifest["noise"]["draw"] == 0
    (batch,) = drawn.batches(3)
    noise = policy.prepare(batch).noise
    (again,) = load_calibration(out).batches(3)
    np.testing.assert_array_equal(policy.prepare(again).noise, noise)
    assert len(np.unique(noise)) == noise.size  # each frame has its own
    other = drawn.with_noise(1)
    assert other.hash != drawn.hash
    (changed,) = other.batches(3)
    np.testing.assert_array_equal(changed["image"], batch["image"])
    assert not set(changed["seed"]) & set(batch["seed"])


def test_frames_of_another_robot_are_refused(policies):
    frames = calibration_set("bundled", frames=1, horizon=3)
    check_frames(policies["pi0"], frames)
    config = policies["pi0"].config

    def of(robot):
        return dataclasses.replace(policies["pi0"], config=dataclasses.replace(config, robot=robot))

    with pytest.raises(InputError, match="actions of 8 entries, this data set has 7"):
        check_frames(of("droid"), frames)
    with pytest.raises(InputError, match="state of 14 entries, this data set has 8"):
        check_frames(of("aloha"), frames)
