"""Settings that every test runs under.

Two virtual CPU devices, so that sharded code paths run in plain CI; no implicit dtype promotion and
no implicit rank promotion, so that neither hides a mistake.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# Linux lets a process map 65,530 regions by default, and every program that XLA compiles for the
# CPU takes a handful: at the limit it aborts.
_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 25_000

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _no_network_proxies_needed() -> None:
    """Tests must not reach for the internet: make hubs fail at once instead of timing out."""
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_stay_few() -> Iterator[None]:
    """Drops compiled programs between modules where the process has mapped many regions."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
