"""Finds a data set at a path, and tells its format by the description that lies there."""

from collections.abc import Mapping
from os import PathLike
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from etils import epath

from qvla_jax.data.places import dataset_folder
from qvla_jax.errors import DatasetError, QvlaError, first_line

Format: TypeAlias = Literal["RLDS", "LeRobot"]
RLDS: Final[Format] = "RLDS"
LEROBOT: Final[Format] = "LeRobot"
# The file that describes a data set of each format.
DESCRIPTIONS: Final[Mapping[Format, str]] = MappingProxyType(
    {RLDS: "dataset_info.json", LEROBOT: "meta/info.json"}
)


def find(path: str | PathLike[str]) -> tuple[Format, epath.Path]:
    """The data set at `path`, or the only one up to two levels below.

    Of a data set elsewhere (see `places.dataset_folder`) it is the local copy.

    Returns:
        Its format, and its directory: that of one version, for RLDS.

    Raises:
        DatasetError: there is none, or more than one, or it cannot be reached.
    """
    path = epath.Path(dataset_folder(path))
    try:
        for kind, description in DESCRIPTIONS.items():
            if (path / description).exists():
                return kind, path
        if not path.is_dir():
            raise DatasetError(f"{path}: no such directory; expected an RLDS or LeRobot data set")
        for above in ("*", "*/*"):
            found: list[tuple[Format, epath.Path]] = [
                (kind, match.parents[description.count("/")])
                for kind, description in DESCRIPTIONS.items()
                for match in sorted(path.glob(f"{above}/{description}"))
            ]
            if len(found) == 1:
                return found[0]
            if found:
                names = ", ".join(str(place) for _, place in found)
                raise DatasetError(f"{path}: several data sets, name one: {names}")
    except QvlaError:
        raise
    except Exception as error:
        # Any error of the library behind an address.
        first = first_line(error)
        raise DatasetError(
            f"{path}: cannot be reached ({first}). An address such as gs:// needs TensorFlow "
            "(pip install 'qvla-jax[rlds]') and the network; a copy on disk needs neither."
        ) from error
    raise DatasetError(
        f"{path}: no {' or '.join(DESCRIPTIONS.values())} in it or below; not an RLDS data "
        "set, nor a LeRobot one"
    )


def locate(path: str | PathLike[str], expected: Format) -> epath.Path:
    """The directory of the data set at `path`, which must have the expected format.

    Raises:
        DatasetError: see `find`; or it has the other format.
    """
    kind, place = find(path)
    if kind != expected:
        raise DatasetError(
            f"{place}: expected an RLDS data set, found a LeRobot one"
            if expected == RLDS
            else f"{place}: expected a LeRobot data set, found an RLDS one"
        )
    return place
