"""The user's cache folder: what can be fetched or computed again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of the cache; it may not exist.

    The cache is the folder that the environment variable QVLA_CACHE names, by default `qvla_jax` in
    XDG_CACHE_HOME or ~/.cache.
    """
    if own := os.environ.get("QVLA_CACHE"):
        return Path(own) / name
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qvla_jax" / name
