"""Opens a data set of any format: what lies at the path says which reader reads it."""

from os import PathLike
from typing import Final

from qvla_jax.data.lerobot import LeRobotDataset
from qvla_jax.data.lerobot.info import read_info
from qvla_jax.data.location import RLDS, find
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.data.records import split_names
from qvla_jax.data.rlds import RldsDataset
from qvla_jax.data.source import EpisodeSource

# Splits to calibrate on if none is named; the first that exists.
_SPLITS: Final = ("calibration", "train")


def open_source(
    path: str | PathLike[str],
    split: str | None = None,
    *,
    spec: DatasetSpec | str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> EpisodeSource:
    """Opens one split of a data set; reads only its description.

    >>> from qvla_jax import data
    >>> data.open_source(data.bundled_path()).split
    'calibration'

    Args:
        path: an RLDS or LeRobot directory, a parent with only one data set up to two levels below,
            or the address of one (gs://...).
        split: a split's name; by default "calibration" if there is one, else "train".
        spec: how to read it: a specification, the name of one, or the name of a JSON file with one.
            By default it is found by the data set's name.
        process_index: the share to read: episodes `process_index`, `+ process_count`, ...
        process_count: number of shares.

    Raises:
        DatasetError: no data set there, no such split, no specification known, or the data set does
            not fit it.
    """
    kind, place = find(path)
    reader = RldsDataset if kind == RLDS else LeRobotDataset
    if split is None:
        names = split_names(place) if kind == RLDS else read_info(place).splits
        split = next((name for name in _SPLITS if name in names), _SPLITS[-1])
    return reader(place, split, spec=spec, process_index=process_index, process_count=process_count)
