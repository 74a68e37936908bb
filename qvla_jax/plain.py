"""Dataclasses to plain JSON types and back, with errors that name the key."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from qvla_jax.errors import InputError, unknown

_KEYS: Final = "keys"
# Metadata of a field whose default is None: it has no key in the JSON object while it is None.
ABSENT_IF_NONE: Final[Mapping[str, str]] = {_KEYS: "absent"}
# The same, and otherwise the keys of its dataclass stand in the JSON object of its owner.
INLINED: Final[Mapping[str, str]] = {_KEYS: "inlined"}


def to_plain(value: Any) -> Any:
    """Turns a dataclass of paths, tuples, mappings and scalars into JSON types.

    Properties that a class names in `DERIVED_KEYS` have keys as well, which `from_plain` ignores.

    Args:
        value: a dataclass, or a value of one of its fields.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dict(_items(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def finite(value: Any) -> Any:
    """A JSON value with null in place of every number that is NaN or infinite.

    Fine-tunes write such numbers into statistics where nothing was recorded, and they are not valid
    JSON. The statistics that a policy uses are checked to be numbers.
    """
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """Builds a value of an annotated type from JSON types; the inverse of `to_plain`.

    Args:
        kind: a dataclass, or the annotation of one of its fields.
        value: what `json` read.
        where: how error messages refer to it.

    Raises:
        InputError: a key is unknown, missing or of the wrong type; the message names it.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected an object, got {value!r}")
        return {key: from_plain(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where}: expected one of {arguments}, got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return from_plain(next(a for a in arguments if a is not type(None)), value, where)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**1023:
            raise InputError(f"{where}: expected a number, got one of {value.bit_length()} bits")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        own, keys = getattr(value, field.name), field.metadata.get(_KEYS)
        if own is None and keys is not None:
            continue
        if keys == "inlined":
            yield from _items(own)
        else:
            yield field.name, to_plain(own)
    for name in getattr(value, "DERIVED_KEYS", ()):
        yield name, to_plain(getattr(value, name))


def _dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object, got {type(value).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    value = _nested(kind, value)
    if extra := sorted(set(value) - set(fields)):
        raise InputError(f"{where}: {unknown('key', extra[0], fields)}")
    hints = typing.get_type_hints(kind)
    built = {k: from_plain(hints[k], v, f"{where}.{k}") for k, v in value.items()}
    missing = [n for n, f in fields.items() if _is_required(f) and n not in built]
    if missing:
        raise InputError(f"{where}: missing key {missing[0]!r}")
    return kind(**built)


def _nested(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """The object without derived keys, and those of inlined dataclasses in objects of their own."""
    derived = getattr(kind, "DERIVED_KEYS", ())
    nested = {key: entry for key, entry in value.items() if key not in derived}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.metadata.get(_KEYS) == "inlined":
            (inner,) = (a for a in typing.get_args(hints[field.name]) if a is not type(None))
            names = {f.name for f in dataclasses.fields(inner)}
            if own := {key: nested.pop(key) for key in list(nested) if key in names}:
                nested[field.name] = own
    return nested


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: expected a list, got {value!r}")
    kinds = arguments
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds = (arguments[0],) * len(value)
    if len(value) != len(kinds):
        raise InputError(f"{where}: expected a list of {len(kinds)}, got {value!r}")
    return tuple(
        from_plain(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(kinds, value, strict=True))
    )
