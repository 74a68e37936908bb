"""The exceptions that this library raises on purpose.

Everything derives from `QvlaError`, so that a caller can catch the library's own errors with one
name. `InputError` and its subclasses mean that what the user handed in is wrong; the command line
turns them into one line on stderr and exit code 2. A message names the file, layer or key, says
what was expected, what was found, and what to do about it.
"""


class QvlaError(Exception):
    """Base class of all errors raised by qvla_jax."""


class InputError(QvlaError):
    """Something handed in (an argument, a file, a name) cannot be used."""


class CheckpointError(InputError):
    """A weights file is missing, corrupt, not finite, or does not fit its model."""


class DatasetError(InputError):
    """A dataset is missing, lacks a key, or has values of the wrong type or shape."""


class BudgetError(InputError):
    """No allocation fits the requested budget."""


class PolicyError(QvlaError):
    """A policy that is being served failed, or its actions are not finite."""
