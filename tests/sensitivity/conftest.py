import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from qvla_jax.inference.quantize import policy_layers
from qvla_jax.quantization import InputStatistics, Quantizer, QuantizerSettings
from qvla_jax.quantization.layers import channel_index
from qvla_jax.sensitivity.sweep import Sweep

from .toys import ToyFrames, toy_policy


@pytest.fixture(scope="session")
def policy():
    return toy_policy()


@pytest.fixture(scope="session")
def linear_policy():
    return toy_policy(linear=True)


@pytest.fixture(scope="session")
def frames():
    return ToyFrames(5)


@pytest.fixture(scope="session")
def layers(policy):
    return policy_layers(policy)


@pytest.fixture(scope="session")
def index(layers):
    return channel_index(layers)


@pytest.fixture(scope="session")
def quantizer(index):
    """Rounds to nearest with any mean inputs: the methods take them as given."""
    rng = np.random.default_rng(7)
    means = {layer.path: rng.normal(size=layer.fan_in) for layer in index.layers}
    return Quantizer(QuantizerSettings(rounding="nearest"), InputStatistics(means))


@pytest.fixture(scope="session")
def sweep(policy, frames, index, quantizer):
    return Sweep(
        policy=policy, calibration=frames, index=index, quantizer=quantizer, bits=(0, 2, 4, 8)
    )


@pytest.fixture
def one_device():
    """A mesh of one device instead of two."""
    return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1), ("data", "channel"))
