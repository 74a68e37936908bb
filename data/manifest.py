"""Calibration manifests: what they hold, the hash that names them, and their checks.

Policies that sample their actions start from noise. Each frame of a set has its own, the same for
every policy that sees the set, so that a difference of actions is never one of noise. It follows
from the set's hash, which the manifest states.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Int64, NpArray
from qvla_jax.errors import DatasetError

FORMAT: Final = 2
# What the manifest's hash covers: everything that determines the content, not its location.
_HASHED: Final = ("format", "horizon", "datasets", "episodes", "steps")
_HASHED_SOURCE: Final = ("dataset", "version", "split", "spec", "files")

# How the seed of a frame's noise follows from a manifest's other entries.
NOISE_RULE: Final = (
    "seed of frame i: the first 31 bits of the SHA-256 of '<sha256>/<draw>/<i>', i counted from 0"
)


def noise(draw: int) -> dict[str, Any]:
    """A manifest's entry on the noise of its frames.

    Args:
        draw: 0, or the number of another draw for the same frames.
    """
    return {"draw": draw, "rule": NOISE_RULE}


def noise_seeds(manifest: Mapping[str, Any]) -> Int64[NpArray, " frames"]:
    """The seed of each frame's noise, by `NOISE_RULE`."""
    start = f"{manifest['sha256']}/{_draw_of(manifest)}"
    digests = (
        hashlib.sha256(f"{start}/{i}".encode()).digest() for i in range(len(manifest["steps"]))
    )
    return np.asarray([int.from_bytes(d[:4], "big") >> 1 for d in digests], np.int64)


def _draw_of(manifest: Mapping[str, Any]) -> int:
    return manifest.get("noise", {}).get("draw", 0)


def steps_by_source(manifest: Mapping[str, Any]) -> list[dict[int, set[int]]]:
    """For each source, the drawn episodes in ascending order, and the steps of each."""
    drawn: list[dict[int, set[int]]] = [{} for _ in manifest["sources"]]
    keys = ("datasets", "episodes", "steps")
    for place, episode, step in sorted(zip(*(manifest[key] for key in keys), strict=True)):
        drawn[place].setdefault(episode, set()).add(step)
    return drawn


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """The sha256 over everything that determines a set's content."""
    content = {key: manifest[key] for key in _HASHED}
    content["sources"] = [
        {key: source[key] for key in _HASHED_SOURCE} for source in manifest["sources"]
    ]
    if draw := _draw_of(manifest):
        content["noise"] = draw
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_manifest(manifest: Any, where: str) -> None:
    """Checks a manifest that was read; `where` names it.

    Raises:
        DatasetError: it is not a manifest, has another format, or was altered.
    """
    if isinstance(manifest, Mapping) and manifest.get("format", FORMAT) != FORMAT:
        raise DatasetError(
            f"{where}: format {manifest['format']}, this version reads {FORMAT}; draw the set again"
        )
    needed = (*_HASHED, "sources", "sha256", "max_episodes")
    if not isinstance(manifest, Mapping) or any(key not in manifest for key in needed):
        raise DatasetError(f"{where}: not a calibration manifest; expected {', '.join(needed)}")
    per_source = (*_HASHED_SOURCE, "source", "weight")
    for source in manifest["sources"]:
        if not isinstance(source, Mapping) or any(key not in source for key in per_source):
            raise DatasetError(f"{where}: a source lacks one of {', '.join(per_source)}")
    if manifest["sha256"] != manifest_hash(manifest):
        raise DatasetError(f"{where}: its content does not fit its sha256; it was altered")
