"""The result of a command, as text and as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        content: the result as JSON types. Numbers that are not finite become null.
        lines: the result as text and tables, printed one below the other.
        failure: why the command failed although it has a result; None if it did not.
        bad_input: the failure is caused by the input.
    """

    content: Mapping[str, Any]
    lines: "tuple[str | Table, ...]"
    failure: str | None = None
    bad_input: bool = False


def print_result(result: Result) -> None:
    """Prints text and tables on stdout."""
    for line in result.lines:
        if isinstance(line, str):
            print(line)
        else:
            _print_table(line)


def _print_table(table: "Table") -> None:
    from rich.console import Console  # text is printed without it

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        # A fixed width, so that piped output is not folded at 80 columns.
        console = Console(markup=False, highlight=False, width=140)
    console.print(table)


def print_json(content: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Prints one JSON object.

    Args:
        content: JSON types.
        file: the destination; stdout by default.
    """
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    print(text, file=sys.stdout if file is None else file)


def _finite(value: Any) -> Any:
    """Replaces values that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
