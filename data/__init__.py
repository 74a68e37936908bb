"""Robot episodes: readers of RLDS and LeRobot sets, statistics, calibration, the bundled sample.

    >>> from qvla_jax import data
    >>> dataset = data.open_source(data.bundled_path(), "heldout")
    >>> episode = next(dataset.episodes())
    >>> episode.image.shape[1:], episode.action.shape[1:]
    ((128, 128, 3), (7,))
    >>> data.open_x.get("bridge_oxe").name  # how each public set is read
    'bridge'

Names are loaded when they are first used: importing this package reads nothing and imports neither
TensorFlow Datasets nor JAX. `qvla_jax.data.open_x` defines how each public data set is read;
`qvla_jax.data.libero` turns LIBERO demonstrations into RLDS.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvla_jax.data.calibration import CalibrationSet as CalibrationSet
    from qvla_jax.data.calibration import calibration_set as calibration_set
    from qvla_jax.data.episode import Episode as Episode
    from qvla_jax.data.episode import Frame as Frame
    from qvla_jax.data.lerobot import LeRobotDataset as LeRobotDataset
    from qvla_jax.data.opening import open_source as open_source
    from qvla_jax.data.rlds import RldsDataset as RldsDataset
    from qvla_jax.data.samples import bundled_path as bundled_path
    from qvla_jax.data.source import EpisodeSource as EpisodeSource
    from qvla_jax.data.statistics import DatasetStatistics as DatasetStatistics
    from qvla_jax.data.statistics import dataset_statistics as dataset_statistics

_LAZY = {
    "CalibrationSet": "calibration",
    "DatasetStatistics": "statistics",
    "Episode": "episode",
    "EpisodeSource": "source",
    "Frame": "episode",
    "LeRobotDataset": "lerobot",
    "RldsDataset": "rlds",
    "bundled_path": "samples",
    "calibration_set": "calibration",
    "dataset_statistics": "statistics",
    "open_source": "opening",
}

__all__ = [
    "CalibrationSet",
    "DatasetStatistics",
    "Episode",
    "EpisodeSource",
    "Frame",
    "LeRobotDataset",
    "RldsDataset",
    "bundled_path",
    "calibration_set",
    "dataset_statistics",
    "open_source",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the lazily loaded names as well."""
    return sorted({*globals(), *__all__})
