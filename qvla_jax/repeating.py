"""The settings of a command, written next to its output and read to repeat it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from qvla_jax.atomic import write_json
from qvla_jax.errors import InputError
from qvla_jax.plain import to_plain
from qvla_jax.provenance import git_commit, package_versions
from qvla_jax.remote.folder import origins

SUFFIX = ".config.json"
_KIND = "qvla_jax.command"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a settings file holds.

    Attributes:
        path: of the file, for messages.
        command: the subcommand.
        variant: the option that selected a variant, such as `--sim`; None for the plain command.
        settings: JSON types, by the names of the command's settings.
    """

    path: Path
    command: str
    variant: str | None
    settings: dict[str, Any]


def settings_file(output: Path, command: str, variant: str | None, *, beside: bool) -> Path:
    """Returns where the settings of a command are kept.

    Args:
        output: the file or folder that it writes.
        command: the subcommand.
        variant: as in `Recorded`.
        beside: next to `output`; False puts them inside it, for folders that commands share.
    """
    if beside:
        return output.with_name(output.name + SUFFIX)
    name = command if variant is None else f"{command}-{variant.strip('-')}"
    return output / f"{name}{SUFFIX}"


def write_settings(path: Path, command: str, variant: str | None, settings: Any) -> None:
    """Writes a settings file.

    Args:
        path: from `settings_file`.
        command: the subcommand.
        variant: as in `Recorded`.
        settings: the command's dataclass.
    """
    write_json(
        path,
        {
            "format": _KIND,
            "version": 1,
            "command": command,
            "variant": variant,
            "settings": to_plain(settings),
            "packages": package_versions(),
            "commit": git_commit(),
            **({"sources": found} if (found := origins()) else {}),
        },
    )


def read_settings(path: Path) -> Recorded:
    """Reads a file that `write_settings` wrote.

    Raises:
        InputError: it is missing, damaged, or another kind of file.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _KIND:
        raise InputError(f"--config {path}: expected the {SUFFIX} file of a command")
    if content.get("version") != 1:
        raise InputError(
            f"--config {path}: format version {content.get('version')!r}, this qvla_jax reads 1"
        )
    try:
        return Recorded(path, content["command"], content["variant"], dict(content["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--config {path}: damaged ({error!r})") from error
