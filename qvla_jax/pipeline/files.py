"""The files that stages exchange, and the checks that they belong together."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qvla_jax.errors import InputError
from qvla_jax.plain import from_plain
from qvla_jax.sensitivity import SensitivityTable

Content = TypeVar("Content")

CALIBRATION = "calibration.json"
SENSITIVITY = "sensitivity.safetensors"
STATISTICS = "statistics.safetensors"
# Seconds of each estimator. Not in the tables, which a resumed sweep reproduces byte for byte.
TIMES = "sensitivity_times.json"
# Where the time of `qvla run` went, stage by stage.
RUN_TIMES = "run_times.json"
# How well the sensitivities rank some channels, of which exact ones are known.
RANKS = "ranks.json"
ALLOCATION = "allocation.safetensors"
POLICY = "policy.qvla"
# Packed policies of other methods.
METHODS = "methods"
# A study: the results of its cells, its episodes, and its tables.
CELLS = "cells"
EPISODES = "closed_loop"
STUDY = "study.json"
STUDY_TABLE = "study.md"
STUDY_ERROR_FIGURE = "study_error.png"
STUDY_SUCCESS_FIGURE = "study_success.png"
EVALUATION = "evaluation.json"
CLOSED_LOOP = "closed_loop.json"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
VALIDATION = "validation.json"
VALIDATION_FIGURE = "validation.png"

# Which command writes which file, for messages.
_WRITERS = {
    CALIBRATION: "calibrate",
    SENSITIVITY: "sensitivity",
    STATISTICS: "sensitivity",
    TIMES: "sensitivity",
    RANKS: "sensitivity",
    ALLOCATION: "allocate",
    POLICY: "quantize",
    EVALUATION: "evaluate",
    RUN_TIMES: "run",
    CLOSED_LOOP: "evaluate --sim libero_spatial",
}


def sensitivity_file(folder: Path, estimator: str, *, main: str) -> Path:
    """Returns the path of an estimator's table; baselines have the estimator in their name."""
    return folder / (SENSITIVITY if estimator == main else f"sensitivity_{estimator}.safetensors")


def check_folder(folder: Path) -> None:
    """Checks that results can be written to `folder`, without creating it.

    Raises:
        InputError: it is a file, or nothing can be written there.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"--out {folder}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--out {folder}: no permission to write in {existing}")


def made_from(table: SensitivityTable) -> dict[str, str]:
    """Returns what a table was measured on: the policy's fingerprint and the calibration hash."""
    return {
        "policy fingerprint": table.provenance["policy"],
        "calibration hash": table.provenance["calibration"],
    }


def needed(path: Path) -> Path:
    """Returns `path` if it exists.

    Raises:
        InputError: it is missing; the message names the command that writes it.
    """
    if path.is_file():
        return path
    writer = _WRITERS.get(path.name, "sensitivity")
    raise InputError(f"{path}: missing; `qvla {writer} --out {path.parent}` writes it")


def read_json(path: Path, *, kind: str, version: int = 1) -> dict[str, Any]:
    """Reads one of our JSON files.

    Raises:
        InputError: it is missing, damaged, of another kind or of another version.
    """
    try:
        content = json.loads(needed(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        raise InputError(f"{path}: expected a {kind} file, found {found!r}")
    if content.get("version") != version:
        raise InputError(
            f"{path}: format version {content.get('version')!r}, this qvla_jax reads {version}"
        )
    return content


def read_result(path: Path, kind: type[Content]) -> Content:
    """Reads one of our JSON files whose content is a dataclass with `format` and `version`.

    Raises:
        InputError: as `read_json`, or a key is unknown, missing or of the wrong type.
    """
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]  # of a dataclass
    defaults = {field.name: field.default for field in fields}
    content = read_json(path, kind=str(defaults["format"]))
    return from_plain(kind, content, str(path))


def check_same(
    path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], *, remedy: str
) -> None:
    """Checks that a file was made from the caller's inputs.

    Args:
        path: the file.
        found: what the file says it was made from.
        expected: what it should have been made from, the same keys.
        remedy: what to do if it was not.

    Raises:
        InputError: a key is missing or differs.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(
                f"{path}: made for another {key} ({_short(found.get(key))}, here it is "
                f"{_short(value)}); {remedy}"
            )


def check_steps(folder: Path, table: SensitivityTable, executed_steps: int | None) -> None:
    """Checks that a table's costs count as many actions of a chunk as errors now do.

    Args:
        folder: of the table.
        table: the main sensitivity table.
        executed_steps: of the policy's layout.

    Raises:
        InputError: they count others.
    """
    if table.executed_steps != executed_steps:
        counted, wanted = (
            "all actions" if steps is None else f"the first {steps} actions"
            for steps in (table.executed_steps, executed_steps)
        )
        raise InputError(
            f"{folder / SENSITIVITY}: its costs count {counted} of a chunk, here count {wanted}: "
            f"say the same --executed-steps, or run `qvla sensitivity --out {folder}` again"
        )


def stale(path: Path, command: str) -> InputError:
    """Returns the error for a file that is older than its sources."""
    return InputError(f"{path}: older than the other files; run `qvla {command}` again")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:16] + "…"
