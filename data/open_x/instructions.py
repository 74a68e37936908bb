"""Instructions as data sets store them, as text."""

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import NpArray
from qvla_jax.errors import DatasetError

# Control characters except line breaks and tabs.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# The results of Python's str() for bytes, for a list of them, and for an array of numbers.
_PYTHON: Final = re.compile(
    r"""\s*(\[\s*)?b(?P<quote>['"]).*(?P=quote).*|\s*array\(.*|\s*\[[-+\d\s.,eE]*\]\s*""", re.DOTALL
)


def instructions(path: str, stored: Sequence[Any], steps: range) -> tuple[str, ...]:
    """The instructions of an episode's steps; either all steps have one or none.

    Args:
        path: the feature.
        stored: its value at each step.
        steps: numbers of the steps in the record.

    Raises:
        DatasetError: one is invalid (see `instruction_text`), or empty while others are not; the
            message names step and feature.
    """
    texts: list[str] = []
    for step, value in zip(steps, stored, strict=True):
        try:
            texts.append(instruction_text(value))
        except DatasetError as error:
            raise DatasetError(f"step {step}: {path}: {error}") from error
    empty = [not text.strip() for text in texts]
    if any(empty) and not all(empty):
        raise DatasetError(
            f"step {steps[empty.index(True)]}: {path}: the instruction is empty, at step "
            f"{steps[empty.index(False)]} it is {texts[empty.index(False)]!r}; mend the data set, "
            "or build it without this episode"
        )
    return tuple(texts)


def instruction_text(value: Any) -> str:
    """Text as stored: UTF-8, or the codes of its bytes, padded with zeros.

    Raises:
        DatasetError: it is not UTF-8, holds control characters, or looks like Python's output for
            bytes or an array.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        value = _from_codes(value)
    elif isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"the instruction {value[:80]!r} is not UTF-8") from error
    if not isinstance(value, str):
        raise DatasetError(f"expected an instruction, found {type(value).__name__}")
    if _CONTROL.search(value):
        raise DatasetError(f"the instruction {value[:80]!r} holds control characters")
    if _PYTHON.fullmatch(value):
        raise DatasetError(
            f"the instruction {value[:80]!r} is what Python prints for bytes or an array, and not "
            "the text in it; build the data set again with the text"
        )
    return value


def _from_codes(codes: NpArray) -> bytes:
    end = int(np.flatnonzero(codes)[-1]) + 1 if codes.any() else 0
    inside = codes.ravel()[:end]
    if codes.ndim != 1 or (inside < 1).any() or (inside > 255).any():
        raise DatasetError(
            "expected the codes of an instruction's bytes, 1 to 255 and then zeros, found "
            f"{codes.ravel()[:8].tolist()}..."
        )
    return bytes(inside.tolist())
