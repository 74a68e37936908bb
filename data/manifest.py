"""Calibration manifests: what they hold, the hash that names them, and their checks."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from qvla_jax.errors import DatasetError

FORMAT: Final = 2
# What the manifest's hash covers: everything that determines the content, not its location.
_HASHED: Final = ("format", "horizon", "datasets", "episodes", "steps")
_HASHED_SOURCE: Final = ("dataset", "version", "split", "spec", "files")


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
