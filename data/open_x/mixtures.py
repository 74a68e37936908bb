"""The named mixtures of OpenVLA's training code: data sets and their sampling weights.

A weight multiplies the number of a set's frames: with weights of 1, frames are drawn as from the
concatenation of all sets.
"""

from collections.abc import Mapping
from os import PathLike
from types import MappingProxyType
from typing import Final

from etils import epath

from qvla_jax.data.open_x import specs
from qvla_jax.errors import DatasetError, InputError, unknown

_RTX: Final = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_orig": 1.0,
    "taco_play": 2.0,
    "jaco_play": 2.0,
    "berkeley_cable_routing": 3.0,
    "roboturk": 1.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 1.0,
    "toto": 1.0,
}
_SOUP: Final = {
    **_RTX,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "language_table": 0.1,
    "stanford_hydra_dataset_converted_externally_to_rlds": 2.0,
    "austin_buds_dataset_converted_externally_to_rlds": 1.0,
    "nyu_franka_play_dataset_converted_externally_to_rlds": 3.0,
    "furniture_bench_dataset_converted_externally_to_rlds": 0.1,
    "ucsd_kitchen_dataset_converted_externally_to_rlds": 2.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 1.0,
    "austin_sirius_dataset_converted_externally_to_rlds": 1.0,
    "dlr_edan_shared_control_converted_externally_to_rlds": 1.0,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}
_SOUP_PLUS: Final = {**_SOUP, "bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}
_LEFT_OUT: Final = ("language_table", "droid")

_SOUP_PLUS_MINUS: Final = {
    **{name: weight for name, weight in _SOUP_PLUS.items() if name not in _LEFT_OUT},
    "fractal20220817_data": 1.0,
}

MIXTURES: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "bridge": {"bridge_orig": 1.0},
        "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
        "rtx": _RTX,
        "oxe_magic_soup": _SOUP,
        "oxe_magic_soup_plus": _SOUP_PLUS,
        "oxe_magic_soup_plus_minus": _SOUP_PLUS_MINUS,
    }
)


def get(name: str) -> Mapping[str, float]:
    """The weights of a named mixture, by data set.

    Raises:
        InputError: the name is unknown.
    """
    if name not in MIXTURES:
        raise InputError(unknown("mixture", name, MIXTURES))
    return MIXTURES[name]


def below(name: str, folder: str | PathLike[str]) -> dict[str, float]:
    """A named mixture as `calibration_set` takes it, with `balance=True`.

    Args:
        name: such as "oxe_magic_soup_plus"; see `MIXTURES`.
        folder: directory or address below which its data sets lie, each by its name.

    Raises:
        InputError: there is no such mixture.
        DatasetError: a data set is missing.
    """
    weights, missing = {}, []
    for dataset, weight in get(name).items():
        names = (dataset, *specs.get(dataset).aliases)
        found = next((p for n in names if (p := epath.Path(folder) / n).exists()), None)
        if found is None:
            missing.append(dataset)
        else:
            weights[str(found)] = weight
    if missing:
        raise DatasetError(
            f"{folder}: mixture {name!r} lacks {', '.join(missing)}; for a part of it give "
            "the data sets and their weights (--weights)"
        )
    return weights
