import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax.families.prismatic.network import action_bins

VOCABULARY = 32000


def test_edges_and_centers_are_those_of_openvla():
    edges = np.linspace(-1, 1, 256)
    np.testing.assert_array_equal(action_bins.EDGES, edges)
    np.testing.assert_array_equal(action_bins.CENTERS, (edges[:-1] + edges[1:]) / 2)


@settings(deadline=None)
@given(st.floats(-2, 2))
def test_decoding_inverts_the_reference_encoding_within_half_a_bin(value):
    # OpenVLA encodes V - digitize(clip(a, -1, 1), edges).
    clipped = np.clip(value, -1, 1)
    token = VOCABULARY - np.digitize(clipped, np.linspace(-1, 1, 256))
    decoded = float(action_bins.decode(np.int32(token), VOCABULARY))
    assert abs(decoded - clipped) <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    ("token", "center"), [(31999, 0), (31998, 1), (31745, 254), (31744, 254), (5, 254), (32063, 0)]
)
def test_tokens_outside_the_bins_are_clipped(token, center):
    decoded = action_bins.decode(np.int32(token), VOCABULARY)
    np.testing.assert_allclose(decoded, action_bins.CENTERS[center], rtol=1e-6)


def test_the_expectation_is_the_softmax_mean_of_the_action_tokens_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7, 400)).astype(np.float32) * 3
    logits[..., :64] += 50  # text tokens
    logits[..., 320:] += 50  # padding rows
    chosen = logits[..., 64:320].astype(np.float64)
    weights = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    index = np.clip(320 - np.arange(64, 320) - 1, 0, 254)
    expected = weights @ ((np.linspace(-1, 1, 256)[:-1] + np.linspace(-1, 1, 256)[1:]) / 2)[index]
    np.testing.assert_allclose(action_bins.expectation(logits, 320), expected, atol=1e-5)


def test_one_certain_token_is_its_bin():
    logits = np.zeros((1, 320), np.float32)
    logits[0, 200] = 1e4
    decoded = action_bins.decode(np.int32(200), 320)
    np.testing.assert_allclose(action_bins.expectation(logits, 320)[0], decoded, rtol=1e-6)
