"""The exceptions that this library raises on purpose.

Everything derives from `QvlaError`, so that a caller can catch the library's own errors with one
name. `InputError` and its subclasses mean that the user's input is wrong; the command line turns
them into one line on stderr and exit code 2. A message names the file, layer or key, says what was
expected, what was found, and what to do about it.
"""

import difflib
from collections.abc import Iterable


class QvlaError(Exception):
    """Base class of all errors raised by qvla_jax."""


class InputError(QvlaError):
    """An input (an argument, a file, a name) cannot be used."""


class CheckpointError(InputError):
    """A weights file is missing, corrupt, not finite, or does not fit its model."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds something that is ignored or a stand-in: perhaps not what was meant."""


class DatasetError(InputError):
    """A dataset is missing, lacks a key, or has values of the wrong type or shape."""


class RemoteError(InputError):
    """A model or data set elsewhere cannot be reached, or its files are not those announced."""


class BudgetError(InputError):
    """No allocation fits the requested budget."""


class PolicyError(QvlaError):
    """A policy that is being served failed, or its actions are not finite."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message about an unknown name, with close matches, or all known names if there are none.

    >>> unknown("model", "libero-mimi", ["libero-mini", "openvla-7b"])
    "unknown model 'libero-mimi'; did you mean libero-mini?"
    >>> unknown("model", "x", ["libero-mini", "openvla-7b"])
    "unknown model 'x'; there are: libero-mini, openvla-7b."

    Args:
        what: what the name is one of, such as "model".
        name: what was given.
        known: all names, in the order in which they are listed.
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return f"unknown {what} {name!r}; did you mean {' or '.join(close)}?"
    return f"unknown {what} {name!r}; there are: {', '.join(names) or 'none'}."
