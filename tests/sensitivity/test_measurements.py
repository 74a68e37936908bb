"""What methods share is what each would measure for itself."""

import numpy as np

from qvla_jax.methods import Measurements, SweepSettings
from qvla_jax.quantization import QuantizerSettings
from qvla_jax.sensitivity import sensitivities


def test_a_table_of_some_options_is_part_of_one_measured_once(policy, frames):
    settings = QuantizerSettings(weighting="action")
    shared = Measurements(policy, frames, sweep=SweepSettings(probes=4))
    options = (0, 3, 8, 16)
    found = shared.table("jacobian", settings, options, True)
    alone = sensitivities(
        policy, frames, method="jacobian", bits=options, quantizer=settings, probes=4
    )
    assert (found.bits, found.settings) == (alone.bits, alone.settings)
    np.testing.assert_allclose(found.costs, alone.costs, rtol=1e-5)
    np.testing.assert_array_equal(found.sizes, alone.sizes)
    np.testing.assert_allclose(found.joint, alone.joint, rtol=1e-3)
    assert shared.table("jacobian", settings, options, True) is found
    other = shared.table("jacobian", settings, (2, 16), False)
    assert other.statistics is found.statistics
    assert other.joint is None
