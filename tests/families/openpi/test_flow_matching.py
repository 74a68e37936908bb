"""The training loss, against one velocity at a time and sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from qvla_jax.families.openpi.network import FlowMatching, Pi0Inputs


@pytest.fixture(scope="module")
def inputs():
    """Two observations of two cameras."""
    rng = np.random.default_rng(0)
    return Pi0Inputs(
        images=rng.integers(0, 256, (2, 2, 28, 28, 3), np.uint8),
        image_mask=np.array([[True, True], [True, False]]),
        tokens=rng.integers(0, 20, (2, 5), np.int32),
        token_mask=np.array([[True] * 5, [True] * 3 + [False] * 2]),
        noise=np.full((2, 3, 9), np.nan, np.float32),  # nothing reads it
        state=rng.normal(size=(2, 9)).astype(np.float32),
    )


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_draws_that_share_a_prefix_are_as_each_by_itself(models, inputs, variant):
    model = models[variant]
    rng = np.random.default_rng(1)
    chunks = rng.normal(size=(2, 3, 9)).astype(np.float32)
    noise = rng.normal(size=(2, 4, 3, 9)).astype(np.float32)
    times = rng.uniform(size=(2, 4)).astype(np.float32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def velocity(inputs, x, time):
        model = nnx.merge(graphdef, state)
        return model.velocity(x, model.prefix(inputs), model.conditioning(time[None, None]))

    squares = []
    for frame in range(2):
        one = jax.tree.map(lambda leaf, frame=frame: leaf[frame : frame + 1], inputs)
        for draw in range(4):
            e, t = noise[frame, draw].astype(np.float64), float(times[frame, draw])
            x = (t * e + (1 - t) * chunks[frame]).astype(np.float32)
            found = np.asarray(velocity(one, x[None], times[frame, draw])[0], np.float64)
            # The robot has 7 of the 9 entries.
            squares.append(np.square(found - (e - chunks[frame]))[:, :7])

    loss = jax.jit(lambda *given: nnx.merge(graphdef, state).matching_error(*given))
    assert float(loss(inputs, chunks, noise, times)) == pytest.approx(np.mean(squares), rel=1e-5)


def test_times_are_openpis_and_noise_is_normal(models, inputs, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        FlowMatching, "matching_error", lambda self, inputs, chunks, *given: drawn.extend(given)
    )
    models["pi05"].loss(inputs, jnp.zeros((1000, 3, 9)), jax.random.key(0))
    noise, times = (np.asarray(values, np.float64) for values in drawn)
    assert noise.shape == (1000, *times.shape[1:], 3, 9)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.02
    # openpi: t = 0.999 s + 0.001 with s from Beta(1.5, 1).
    quantiles = scipy.stats.beta(1.5, 1).cdf((times - 0.001) / 0.999)
    assert scipy.stats.kstest(quantiles.ravel(), "uniform").pvalue > 0.01
    # Each chunk has one in every span.
    spans = np.floor(quantiles * times.shape[1] * (1 - 1e-6)).astype(int)
    np.testing.assert_array_equal(spans, np.broadcast_to(np.arange(times.shape[1]), spans.shape))
