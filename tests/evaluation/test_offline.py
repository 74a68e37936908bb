"""Offline action error against float64 formulas written out with loops."""

import numpy as np
import pytest

from qvla_jax.data.calibration import calibration_set
from qvla_jax.errors import InputError
from qvla_jax.evaluation import action_errors, gripper_flips, predict
from qvla_jax.evaluation.offline import PreparedFrames
from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.inference import random_policy
from qvla_jax.inference.comparable import comparable


class FakePolicy:
    """Predicts the state plus a constant, and normalizes by halving."""

    layout = layout(preset("tiny-test"))

    def infer_normalized(self, batch):
        return np.asarray(batch["state"], np.float32)[:, None, :7] * np.ones((1, 3, 1), np.float32)

    def normalize_standard(self, actions, state=None):
        return actions / np.float32(2)


class FakeFrames:
    def __init__(self, states, actions):
        self.states, self.actions = states, actions
        self.frames = len(states)

    def batches(self, n):
        for i in range(0, self.frames, n):
            batch = {"state": self.states[i : i + n]}
            if self.actions is not None:
                batch["actions"] = self.actions[i : i + n]
            yield batch


@pytest.fixture
def chunks():
    random = np.random.default_rng(0)
    return (
        random.normal(size=(5, 3, 7)).astype(np.float32),
        random.normal(size=(5, 3, 7)).astype(np.float32),
    )


def test_errors_equal_the_formulas_written_out(chunks):
    candidate, reference = chunks
    errors = action_errors(candidate, reference)
    sse, mse, l1, flips = 0.0, 0.0, 0.0, 0
    of_frames = [0.0] * 5
    by_dimension, worst = [0.0] * 7, [0.0] * 7
    for n in range(5):
        for h in range(3):
            for a in range(7):
                e = float(candidate[n, h, a]) - float(reference[n, h, a])
                sse += e * e / 5
                mse += e * e / (5 * 3 * 7)
                of_frames[n] += e * e / (3 * 7)
                l1 += abs(e) / (5 * 3 * 7)
                by_dimension[a] += e * e / 15
                worst[a] = max(worst[a], abs(e))
            flips += (candidate[n, h, 6] > 0.5) != (reference[n, h, 6] > 0.5)
    np.testing.assert_allclose(errors.action_sse_normalized, sse, rtol=1e-12)
    np.testing.assert_allclose(errors.action_mse_normalized, mse, rtol=1e-12)
    median = sorted(of_frames)[2]
    np.testing.assert_allclose(errors.action_mse_median_normalized, median, rtol=1e-12)
    np.testing.assert_allclose(errors.action_l1_normalized, l1, rtol=1e-12)
    np.testing.assert_allclose(errors.mse_by_dimension, by_dimension, rtol=1e-12)
    np.testing.assert_allclose(errors.worst_by_dimension, worst, rtol=1e-12)
    assert errors.gripper_flips == flips
    assert errors.gripper_flip_rate == pytest.approx(flips / 15)


def test_summed_error_is_the_mean_error_times_the_entries_of_a_chunk(chunks):
    errors = action_errors(*chunks)
    assert errors.action_sse_normalized == pytest.approx(21 * errors.action_mse_normalized)


def test_equal_chunks_have_no_error(chunks):
    errors = action_errors(chunks[0], chunks[0])
    assert errors.action_mse_normalized == 0
    assert errors.gripper_flips == 0
    assert max(errors.worst_by_dimension) == 0


def test_gripper_flips_look_at_the_grippers_alone():
    reference = np.zeros((2, 2, 7), np.float32)
    candidate = np.ones((2, 2, 7), np.float32)
    candidate[..., -1] = [[0.4, 0.6], [0.5, -3.0]]
    assert gripper_flips(candidate, reference) == 1
    # Those of both arms.
    assert gripper_flips(candidate, reference, grippers={0: 0.5, 6: 0.5}) == 5
    # Where grippers are normalized, half open is another number.
    assert gripper_flips(candidate, reference, grippers={6: 0.45}) == 2


def test_small_differences_are_summed_in_float64():
    reference = np.full((4000, 8, 7), 1.0, np.float32)
    candidate = reference + np.float32(2**-20)
    assert action_errors(candidate, reference).action_mse_normalized == 2.0**-40


@pytest.mark.parametrize("shape", [(5, 3), (0, 3, 7), (4, 3, 7)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(InputError, match=r"\[N, h, a\]"):
        action_errors(np.zeros(shape, np.float32), np.zeros((5, 3, 7), np.float32))


def test_chunks_that_are_not_finite_are_refused(chunks):
    chunks[1][2, 1, 0] = np.nan
    with pytest.raises(InputError, match="reference chunks"):
        action_errors(*chunks)


def test_prepared_frames_give_what_the_policy_predicts_itself():
    policy = random_policy("tiny-test")
    frames = calibration_set("bundled", frames=5, split="heldout")
    expected = predict(policy, frames)
    # The last batch of two is padded; biases of zero change nothing.
    prepared = PreparedFrames.of(policy, frames, batch_size=2)
    for found in (prepared.predict(policy), prepared.predict(comparable(policy))):
        # Batches of other sizes sum in another order.
        np.testing.assert_allclose(found.chunks, expected.chunks, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found.expert, expected.expert)


def test_predictions_do_not_depend_on_the_batch_size():
    random = np.random.default_rng(0)
    states = random.normal(size=(7, 8)).astype(np.float32)
    actions = random.normal(size=(7, 3, 7)).astype(np.float32)
    frames = FakeFrames(states, actions)
    calls = []
    small = predict(FakePolicy(), frames, batch_size=2, progress=lambda *a: calls.append(a))
    large = predict(FakePolicy(), frames, batch_size=100)
    np.testing.assert_array_equal(small.chunks, large.chunks)
    np.testing.assert_array_equal(small.expert, actions / 2)
    assert calls[-1] == ("evaluate", 4, 4)


def test_frames_without_expert_actions_are_refused():
    frames = FakeFrames(np.zeros((2, 8), np.float32), None)
    with pytest.raises(InputError, match="'actions'"):
        predict(FakePolicy(), frames)


def test_predictions_that_are_not_finite_are_refused():
    frames = FakeFrames(np.full((2, 8), np.nan, np.float32), np.zeros((2, 3, 7), np.float32))
    with pytest.raises(InputError, match="not finite"):
        predict(FakePolicy(), frames)
