"""Every stage of pi0 and pi0.5 against what openpi's own JAX code computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.checkpoints.weights import assign_tensors
from qvla_jax.families.openpi.checkpoint import NamedTensors, open_tensors
from qvla_jax.families.openpi.names import parameters
from qvla_jax.families.openpi.network import abstract_model

from .openpi import PROGRAMS, integrate
from .reference import install
from .trim_openpi import NAMES

_EXACT = ("prefix_mask", "prefix_positions", "suffix_positions", "suffix_attn_mask")
# Inputs, other entries of the record, and stages that tests of their own compare.
_INPUTS = (
    "image_base", "image_left", "image_right", "image_mask", "image_float", "state", "tokenized_",
    "noise", "num_steps", "policy_", "robots_", "bf16",
)  # fmt: skip
_OTHERWISE = {
    "prefix_attn_mask", "prefix_ar_mask", "suffix_ar_mask", "suffix_mask", "times", "v_t", "x_t",
    "actions", "actions_jit", "actions_4_steps", "loss", "loss_v_t", "loss_x_t", "loss_noise",
    "loss_time", "loss_actions",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_stage_is_matched(openpi_runs, name):
    reference, run = openpi_runs(name)
    compared = []
    for stage in reference.arrays:
        if stage in _OTHERWISE or (stage.startswith(_INPUTS) and stage != "state_proj_out"):
            continue
        found = run.found[stage]
        if stage in _EXACT:
            np.testing.assert_array_equal(found, reference.arrays[stage], err_msg=stage)
        else:
            assert reference.deviation(stage, found) <= reference.tolerance(stage), stage
        compared.append(stage)
    assert len(compared) == 28, sorted(compared)


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_those_of_the_block_causal_rule(openpi_runs, name):
    reference, run = openpi_runs(name)
    valid = run.found["prefix_mask"]
    # The prefix is one block, and so a mask over keys says it all for the rows that are read.
    recorded = reference.arrays["prefix_attn_mask"]
    for sample, places in enumerate(valid):
        np.testing.assert_array_equal(
            recorded[sample][places], np.broadcast_to(places, (places.sum(), len(places)))
        )
    assert not reference.arrays["prefix_ar_mask"].any()
    assert reference.arrays["suffix_mask"].all()
    blocks = np.cumsum(reference.arrays["suffix_ar_mask"])
    mask = reference.policy.model.suffix_mask(len(blocks))
    own = np.ones((len(blocks),) * 2, bool) if mask is None else np.asarray(mask)[0, 0]
    np.testing.assert_array_equal(own, blocks[None] <= blocks[:, None])


@pytest.mark.parametrize("name", NAMES)
def test_every_euler_step_is_matched(openpi_runs, name):
    reference, run = openpi_runs(name)
    model, arrays = reference.policy.model, reference.arrays
    np.testing.assert_array_equal(model.times, arrays["times"])
    found = integrate(model, arrays["noise"], run.prefix, run.conditioning)
    for stage in ("v_t", "x_t", "actions"):
        assert reference.deviation(stage, found[stage]) <= reference.tolerance(stage), stage
    np.testing.assert_allclose(found["actions"], arrays["actions"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["actions"], arrays["actions_jit"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_four_steps_are_matched(openpi_runs, monkeypatch, name):
    reference, run = openpi_runs(name)
    install(PROGRAMS, monkeypatch)
    model = nnx.clone(reference.policy.model)
    model.config = dataclasses.replace(model.config, num_steps=4)
    with jax.default_matmul_precision("float32"):
        conditioning = model.conditioning(model.times[None])
        x = jnp.asarray(reference.arrays["noise"])
        for step in range(4):
            x = model.step(x, run.prefix, conditioning.at(step))
    np.testing.assert_allclose(x, reference.arrays["actions_4_steps"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_training_loss_is_matched_with_a_time_for_each_sample(openpi_runs, monkeypatch, name):
    reference, run = openpi_runs(name)
    install(PROGRAMS, monkeypatch)
    model, arrays = reference.policy.model, reference.arrays
    with jax.default_matmul_precision("float32"):
        conditioning = model.conditioning(jnp.asarray(arrays["loss_time"])[:, None])
        velocity = model.velocity(jnp.asarray(arrays["loss_x_t"]), run.prefix, conditioning)
    assert reference.deviation("loss_v_t", np.asarray(velocity)) <= reference.tolerance("loss_v_t")
    loss = np.mean((velocity - (arrays["loss_noise"] - arrays["loss_actions"])) ** 2, axis=-1)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_loop_takes_the_same_steps_without_absent_cameras(openpi_runs, name):
    """One program of one step, and sample 0 without the camera that it lacks."""
    reference, _ = openpi_runs(name)
    inputs = jax.tree.map(lambda x: x[:1], reference.inputs)
    shorter = dataclasses.replace(
        inputs, images=inputs.images[:, :2], image_mask=inputs.image_mask[:, :2]
    )
    assert not inputs.image_mask[0, 2]
    actions = reference.policy.run(shorter)
    np.testing.assert_allclose(actions, reference.arrays["actions"][:1], atol=1e-4, rtol=0)


def test_bfloat16_is_as_far_off_as_openpis(openpi_references):
    """Weights and arithmetic as in openpi's policy server."""
    reference = openpi_references("pi0_tiny")
    config = dataclasses.replace(reference.policy.config, dtype="bfloat16")
    model = abstract_model(config, dtype=jnp.bfloat16)
    tensors = NamedTensors(model, open_tensors(reference.folder, model))
    assign_tensors(model, tensors, source="reference")
    assert {v.dtype.name for _, v in parameters(model)} == {"bfloat16"}
    graphdef, state = nnx.split(model)
    actions = jax.jit(lambda state, x: nnx.merge(graphdef, state).actions(x))(
        state, reference.inputs
    )
    arrays = reference.arrays

    def error(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.linalg.norm(first - second) / np.linalg.norm(second))

    public = error(arrays["bf16p_actions"], arrays["actions"])
    assert error(np.asarray(actions), arrays["actions"]) < 1.5 * public
    assert error(np.asarray(actions), arrays["bf16p_actions"]) < 1.5 * public
