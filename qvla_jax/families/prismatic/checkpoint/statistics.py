"""Statistics of data sets: checked where used."""

from collections.abc import Mapping
from typing import Any

from qvla_jax.checkpoints.declared import check_declared, shown
from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.keys import BLOCK, STATISTICS


def check_entry(statistics: Mapping[str, Any], key: str, source: str) -> None:
    """Checks what the statistics of one data set declare.

    Args:
        statistics: data set name -> its statistics.
        key: the data set.
        source: the file, for errors.

    Raises:
        CheckpointError: they are not an object, or hold an unknown key.
    """
    entry = statistics[key]
    for where, found, rules in (
        (f"{source}: {key}", entry, STATISTICS),
        *(
            (f"{source}: {key}.{name}", _block(entry, name), BLOCK)
            for name in ("action", "proprio")
        ),
    ):
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{where}: expected an object, found {shown(found)}")
        check_declared(found, rules, where)


def _block(entry: Any, name: str) -> Any:
    return entry.get(name, {}) if isinstance(entry, Mapping) else {}
