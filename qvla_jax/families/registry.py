"""Families by name, by preset, by what a directory holds, and by what a file of ours records."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qvla_jax.checkpoints.files import (
    CONFIG_FILE,
    ORBAX_FOLDER,
    STATISTICS_FILE,
    WEIGHTS_FILE,
    read_json,
)
from qvla_jax.errors import CheckpointError, InputError, unknown
from qvla_jax.families import FAMILIES
from qvla_jax.families.family import Config, Family
from qvla_jax.families.options import LoadOptions

# Key of recorded configurations that names the family.
FAMILY_KEY: Final = "family"
_KNOWN: dict[str, Family] = {}


def register(family: Family) -> None:
    """Adds a family, or replaces the one of the same name, for this process."""
    _KNOWN[family.name] = family


def family_named(name: str) -> Family:
    """The family of this name, imported on first use.

    Raises:
        InputError: there is none; the message lists close matches.
    """
    if name not in _KNOWN:
        if name not in FAMILIES:
            raise InputError(unknown("family", name, _names()))
        register(importlib.import_module(FAMILIES[name]).FAMILY)
    return _KNOWN[name]


def family_of(config: Config) -> Family:
    """The family of a configuration."""
    return family_named(config.family)


def preset(name: str) -> Any:
    """The configuration of this name, of any family.

    Raises:
        InputError: the name is unknown; the message lists close matches.
    """
    known: list[str] = []
    for family in _families():
        if name in family.presets:
            return family.presets[name]
        known += family.presets
    raise InputError(unknown("model", name, known))


def public_family(folder: Path) -> Family | None:
    """The family whose public layout a directory has; None if it has none's, or is none.

    Raises:
        CheckpointError: a file that would tell is damaged.
    """
    if not folder.is_dir():
        return None
    path = folder / CONFIG_FILE
    if path.is_file() and FAMILY_KEY in read_json(path):
        return None  # one of ours
    return next((family for family in _families() if family.recognizes(folder)), None)


def files_to_read(
    source: str, names: Sequence[str], settings: Mapping[str, Any], options: LoadOptions
) -> list[str]:
    """The files that loading a directory reads, of one that is elsewhere; see `Family`.

    Args:
        source: the directory, for errors.
        names: paths of all its files.
        settings: the content of its config.json; empty without one.
        options: what the files do not say.

    Returns:
        Some of `names`; none if it holds no policy.
    """
    if FAMILY_KEY not in settings:
        found = (f.public_files(source, names, settings, options) for f in _families())
        return next(filter(None, found), [])
    own = family_of(from_record(settings, source))
    single = (CONFIG_FILE, STATISTICS_FILE, WEIGHTS_FILE, *own.files)
    return [n for n in names if n in single or n.partition("/")[0] == ORBAX_FOLDER]


def to_record(config: Config) -> dict[str, Any]:
    """What files of ours keep of a configuration: plain JSON with the family's name."""
    return {FAMILY_KEY: config.family, **config.to_dict()}


def from_record(record: Any, source: str | Path) -> Any:
    """Inverse of `to_record`.

    Args:
        record: what a file holds.
        source: the file, for errors.

    Raises:
        CheckpointError: it names no family or an unknown one, or is not a configuration of it.
    """
    if not isinstance(record, Mapping):
        raise CheckpointError(
            f"{source}: expected the configuration of a policy, found {type(record).__name__}"
        )
    if not isinstance(name := record.get(FAMILY_KEY), str):
        raise CheckpointError(
            f"{source}: the configuration names no {FAMILY_KEY!r} of policies; if this library "
            f"wrote it before families had names, add the one it is of: {', '.join(_names())}"
        )
    values = {key: value for key, value in record.items() if key != FAMILY_KEY}
    try:
        return family_named(name).config(values)
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _names() -> list[str]:
    return list(dict.fromkeys((*FAMILIES, *_KNOWN)))


def _families() -> Iterator[Family]:
    yield from map(family_named, _names())
