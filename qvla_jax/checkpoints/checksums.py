"""SHA-256 of every file of a folder, kept in the folder, to detect changed bytes on reading.

For checkpoints whose format has no checksums of its own; older ones without the list are read
unchecked.
"""

import hashlib
import json
from pathlib import Path

from qvla_jax.atomic import write_json
from qvla_jax.errors import CheckpointError

CHECKSUMS_FILE = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Lists every file below the folder, which must be complete."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS_FILE)
    sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
    write_json(folder / CHECKSUMS_FILE, {"sha256": sums})


def check_checksums(folder: Path, *, remedy: str) -> None:
    """Reads every listed file once; without a list there is nothing to check.

    Args:
        folder: what `write_checksums` was called with.
        remedy: end of the error message, saying what to do.

    Raises:
        CheckpointError: a file is missing or not the one that was written, or the list is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return
    try:
        sums = dict(json.loads(path.read_text())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); {remedy}") from error
    for name, expected in sums.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(f"{folder / name}: {reason}; {remedy}") from error
        if found != expected:
            raise CheckpointError(f"{folder / name}: not the bytes that were written; {remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
