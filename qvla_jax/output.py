"""What a command found, for people and for machines."""

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
        content: for machines: JSON types. Numbers that are not finite become null.
        lines: for people: lines of text and tables, one below the other.
        failure: what makes it a failure all the same; None where nothing does.
        bad_input: the failure is the fault of what was handed in.
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
        file: where to; stdout if left out.
    """
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    print(text, file=sys.stdout if file is None else file)


def _finite(value: Any) -> Any:
    """Replaces what JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
