"""Where a policy is on this machine: fetched first, if it is named elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvla_jax.checkpoints.files import CONFIG_FILE, read_json
from qvla_jax.checkpoints.packed_file import SUFFIX
from qvla_jax.errors import RemoteError
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.registry import files_to_read
from qvla_jax.progress import Progress
from qvla_jax.remote.places import elsewhere


def policy_folder(
    source: str | Path,
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    *,
    progress: Progress | None = None,
) -> Path:
    """The local path of a policy; all that takes a policy by its name asks here.

    Args:
        source: what the user names; see `load_policy`.
        options: what the files do not say; some need more files.
        progress: called with the megabytes that arrive; None leaves it to the Hub's library to draw
            bars of its own.

    Returns:
        The folder, with the files that loading reads. `source` itself if it is no other place; it
        may not exist.

    Raises:
        RemoteError: there is no such place, or a file cannot be fetched, or is damaged.
    """
    name = str(source).rpartition("@")[0] or str(source)
    remote = None if name.endswith(SUFFIX) else elsewhere(source, "model")
    if remote is None:
        return Path(source)
    names = list(remote.files)
    settings: Mapping[str, Any] = {}
    if CONFIG_FILE in names:
        remote.fetch([CONFIG_FILE], progress)
        settings = read_json(remote.folder / CONFIG_FILE)
    wanted = files_to_read(str(source), names, settings, options)
    if not wanted:
        some = ", ".join(sorted(names)[:5])
        raise RemoteError(f"{source}: no checkpoint that is read; it holds {some}")
    remote.fetch(wanted, progress)
    return remote.folder
