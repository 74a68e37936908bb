"""Where a data set is on this machine: named elsewhere, its description is fetched first.

Data files follow one by one, as they are opened: `remote.folder.ensure` before a file is opened
fetches it, if it is one of a data set that is elsewhere.
"""

from os import PathLike
from typing import Final

from qvla_jax.progress import Progress
from qvla_jax.remote.places import elsewhere

# Files of RLDS that describe a data set, and the folder of LeRobot that does, where some are not
# read: its statistics.
_DESCRIPTIONS: Final = ("dataset_info.json", "features.json", "metadata.json")
_FOLDER: Final = "meta"
_UNREAD: Final = ("stats.json", "episodes_stats.jsonl")
# RLDS there is read in place, by TensorFlow: such sets have terabytes.
_IN_PLACE: Final = "gs://"


def dataset_folder(
    source: str | PathLike[str], *, progress: Progress | None = None
) -> str | PathLike[str]:
    """The local folder of a data set, with the files that describe it.

    Args:
        source: what the user names: a path, `OWNER/NAME[/FOLDER][@REVISION]` of the Hugging Face
            Hub, or an address. A path that exists is never taken for another place.
        progress: called with the megabytes that arrive, then and as data files follow.

    Returns:
        The folder; `source` itself if it is no other place, or one that is read in place.

    Raises:
        RemoteError: there is no such place, or a file cannot be fetched, or is damaged.
    """
    if not isinstance(source, str) or source.startswith(_IN_PLACE):
        return source
    remote = elsewhere(source, "dataset")
    if remote is None:
        return source
    remote.progress = progress or remote.progress
    folders = ((name, *name.rpartition("/")[::2]) for name in remote.files)
    remote.fetch(
        name
        for name, folder, last in folders
        if last in _DESCRIPTIONS or (_FOLDER in folder.split("/") and last not in _UNREAD)
    )
    return remote.folder
