"""Settings that every test runs under.

Two virtual CPU devices, so that sharded code paths run in plain CI; no implicit dtype promotion and
no implicit rank promotion, so that neither hides a mistake.
"""

import os

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _no_network_proxies_needed() -> None:
    """Tests must not reach for the internet: make hubs fail at once instead of timing out."""
    os.environ["HF_HUB_OFFLINE"] = "1"
