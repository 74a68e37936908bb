"""Where a policy is on this machine: fetched first, if it is named elsewhere."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from qvla_jax.checkpoints.files import CONFIG_FILE, folder_name, read_json
from qvla_jax.checkpoints.packed_file import SUFFIX
from qvla_jax.errors import RemoteError
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.registry import files_to_read
from qvla_jax.progress import Progress
from qvla_jax.remote.folder import RemoteFolder
from qvla_jax.remote.places import elsewhere

_SAFETENSORS: Final = ".safetensors"
# In the folder of an array, what is no part of its values.
_ZARR: Final = (".zarray", ".zattrs")


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
    remote = _elsewhere(source)
    if remote is None:
        return Path(source)
    remote.fetch(_wanted(remote, source, options, progress), progress)
    return remote.folder


@contextmanager
def policy_outline(
    source: str | Path,
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    *,
    progress: Progress | None = None,
) -> Iterator[Path]:
    """Like `policy_folder`, for those who read names, shapes and dtypes of the weights only.

    Of a policy elsewhere whose weights are not here yet, the folder lasts as long as the context:
    of safetensors files it has the headers, which no checksum covers, and of arrays in zarr the
    descriptions. Other files are fetched and checked.
    """
    remote = _elsewhere(source)
    wanted = [] if remote is None else _wanted(remote, source, options, progress)
    arrays = {name.rpartition("/")[0] for name in wanted if name.endswith(f"/{_ZARR[0]}")}
    values = [
        name
        for name in wanted
        if name.endswith(_SAFETENSORS)
        or (name.rpartition("/")[0] in arrays and name.rpartition("/")[2] not in _ZARR)
    ]
    if remote is None or all((remote.folder / name).is_file() for name in values):
        yield policy_folder(source, options, progress=progress)
        return
    others = [name for name in wanted if name not in set(values)]
    remote.fetch(others, progress)
    with tempfile.TemporaryDirectory(prefix="qvla-") as made:
        folder = Path(made) / folder_name(remote.folder)
        for name in others:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((remote.folder / name).absolute())
        for name in values:
            if name.endswith(_SAFETENSORS):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                remote.fetch_header(name, folder / name)
        yield folder


def _elsewhere(source: str | Path) -> RemoteFolder | None:
    name = str(source).rpartition("@")[0] or str(source)
    return None if name.endswith(SUFFIX) else elsewhere(source, "model")


def _wanted(
    remote: RemoteFolder, source: str | Path, options: LoadOptions, progress: Progress | None
) -> Sequence[str]:
    """The files that loading reads."""
    names = list(remote.files)
    settings: Mapping[str, Any] = {}
    if CONFIG_FILE in names:
        remote.fetch([CONFIG_FILE], progress)
        settings = read_json(remote.folder / CONFIG_FILE)
    wanted = files_to_read(str(source), names, settings, options)
    if not wanted:
        some = ", ".join(sorted(names)[:5])
        raise RemoteError(f"{source}: no checkpoint that is read; it holds {some}")
    return wanted
