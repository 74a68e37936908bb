"""Rules for the keys of a settings file: which are followed, irrelevant, or refused.

Nothing that a file declares is silently ignored: a key is read (`Follow`), known to change no
number (`Ignore`), or supported only with some values (`Only`). Every other key is refused by name,
since it would have no effect. `qvla_jax.families.prismatic.checkpoint.keys` holds the lists.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvla_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Follow:
    """The reader uses the value, and checks it."""


@dataclasses.dataclass(frozen=True)
class Ignore:
    """No value changes a number."""

    why: str


@dataclasses.dataclass(frozen=True)
class Only:
    """These values request what is done anyway."""

    values: tuple[Any, ...]
    why: str = ""


Rule = Follow | Ignore | Only


def check_declared(
    found: Mapping[str, Any], rules: Mapping[str, Rule], where: str, *, off_passes: bool = False
) -> None:
    """Checks every key of one object of a settings file.

    Args:
        found: what the file holds.
        rules: for each known key.
        where: the file, and the object in it, for errors.
        off_passes: an unknown key passes if its value is null, false or empty: for files that list
            all switches of a library that gains new ones.

    Raises:
        CheckpointError: a key is unknown, or its value is not supported. The message names file,
            key and value.
    """
    for key, value in found.items():
        rule = rules.get(key)
        if rule is None:
            if off_passes and (value is None or value is False or value in ({}, [], "")):
                continue
            raise CheckpointError(
                f"{where}: {key!r} is {shown(value)}: this key is not known, and what it asks for "
                "would not be done; take it out if it changes nothing"
            )
        if isinstance(rule, Only) and not any(_same(value, known) for known in rule.values):
            expected = " or ".join(shown(known) for known in rule.values)
            raise CheckpointError(
                f"{where}: {key!r} is {shown(value)}, which is not supported; expected {expected}"
                f"{f' ({rule.why})' if rule.why else ''}"
            )


def shown(value: Any) -> str:
    """A value for error messages: the beginning of its text."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _same(value: Any, known: Any) -> bool:
    return isinstance(value, bool) == isinstance(known, bool) and value == known
